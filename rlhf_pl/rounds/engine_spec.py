"""A run's requirements for its sampler: the engine's size, the prompts per shard, and the prompts of the self-check."""

from collections.abc import Sequence

import lightning as L

from rlhf_pl.data.policy_module import PolicyModule, as_lightning
from rlhf_pl.data.round_datamodule import RoundDataModule
from rlhf_pl.models.footprint import reward_bytes, trainer_bytes
from rlhf_pl.rollout import EngineSpec, Sampler
from rlhf_pl.rounds.settings import RoundOptions


def make_engine_spec(
    trainer: L.Trainer, module: PolicyModule, data: RoundDataModule, sampler: Sampler, options: RoundOptions
) -> EngineSpec:
    """Describe an engine with room for the longest sequence and for all prompts that it gets at once."""
    engines = _count_engines(trainer, sampler)

    def concurrent_prompts(prompts: int) -> int:
        if options.stream_shards:
            return -(-prompts // engines)
        return prompts_per_shard(trainer, sampler, options, prompts)

    max_responses = max(
        options.sampling.num_responses * concurrent_prompts(len(data.round_prompts(0))),
        options.val_sampling.num_responses * concurrent_prompts(len(data.val_prompts)),
    )
    used_bytes = trainer_bytes(as_lightning(module), trainer.strategy.root_device) + reward_bytes(options.reward)
    return EngineSpec(module.source, data.longest_tokens, max_responses, used_bytes)


def prompts_per_shard(trainer: L.Trainer, sampler: Sampler, options: RoundOptions, prompts: int) -> int:
    """The user's number, or fewer where some engine would otherwise get no shard."""
    return max(1, min(options.shard_prompts, -(-prompts // _count_engines(trainer, sampler))))


def self_check_prompts(data: RoundDataModule) -> Sequence[Sequence[int]]:
    """Token ids of the prompts that the sampler's self-check uses."""
    return [p.token_ids[-16:] for p in data.train_prompts[:4]]  # whole prompts would cost more and show little more


def _count_engines(trainer: L.Trainer, sampler: Sampler) -> int:
    return trainer.world_size // sampler.ranks_per_engine
