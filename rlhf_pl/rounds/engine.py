"""What a run needs of its sampler: how large an engine, files of how many prompts, and the prompts of its check."""

from collections.abc import Sequence

import lightning as L

from rlhf_pl.data.policy_module import PolicyModule, as_lightning
from rlhf_pl.data.round_datamodule import RoundDataModule
from rlhf_pl.models.footprint import reward_bytes, trainer_bytes
from rlhf_pl.rollout import EngineSpec, Sampler
from rlhf_pl.rounds.settings import RoundOptions


def engine_spec(
    trainer: L.Trainer, module: PolicyModule, data: RoundDataModule, sampler: Sampler, options: RoundOptions
) -> EngineSpec:
    """The engine that has room for the longest sequence and for the prompts that are sampled from together."""
    engines = _engines(trainer, sampler)

    def together(prompts: int) -> int:
        return (
            -(-prompts // engines) if options.stream_shards else prompts_per_shard(trainer, sampler, options, prompts)
        )

    most = max(
        options.sampling.num_responses * together(len(data.round_prompts(0))),
        options.val_sampling.num_responses * together(len(data.val_prompts)),
    )
    held = trainer_bytes(as_lightning(module), trainer.strategy.root_device) + reward_bytes(options.reward)
    return EngineSpec(module.source, data.longest_tokens, most, held)


def prompts_per_shard(trainer: L.Trainer, sampler: Sampler, options: RoundOptions, prompts: int) -> int:
    """At most what the user wants, and few enough that every engine has a shard."""
    return max(1, min(options.shard_prompts, -(-prompts // _engines(trainer, sampler))))


def check_prompts(data: RoundDataModule) -> Sequence[Sequence[int]]:
    """Token ids that the sampler's check begins with."""
    return [p.token_ids[-16:] for p in data.train_prompts[:4]]  # whole ones would cost more than they show


def _engines(trainer: L.Trainer, sampler: Sampler) -> int:
    return trainer.world_size // sampler.ranks_per_engine
