"""Settings that rounds are made with: as options, and as manifests record them."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import lightning as L
import torch

from rlhf_pl.algorithms.pair_selection import BestWorst, PairSelector
from rlhf_pl.algorithms.prompt_groups import SUMMED, Z_REF
from rlhf_pl.algorithms.reward_shaping import RewardShaping
from rlhf_pl.data.policy_module import PolicyModule
from rlhf_pl.data.round_datamodule import RoundDataModule
from rlhf_pl.rewards import Reward, ScoringConfig
from rlhf_pl.rollout import SamplingConfig
from rlhf_pl.store.provenance import StageSettings
from rlhf_pl.store.round_store import Round
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.fingerprints import describe

_HELD_OUT_RESPONSES = 64  # of all held-out prompts, at least nearly


@dataclass(frozen=True)
class RoundOptions:
    """The options of `RoundRefresh`; see its docstring."""

    reward: Reward
    scoring: ScoringConfig
    sampling: SamplingConfig
    val_sampling: SamplingConfig
    selector: PairSelector | None  # None for the default of a loss on pairs
    shaping: RewardShaping
    prompts_per_shard: int | None
    logps_batch_tokens: int
    old_logps: Literal["policy", "sampler"] = "policy"
    stream_shards: bool = False
    refill: int = 0
    drop_truncated: bool = False
    store_token_logps: bool = False
    from_other_run: bool = False  # responses and rewards of the rounds come from another run

    @property
    def shard_prompts(self) -> int:
        """Prompts per shard: a minute or two of an engine's work."""
        return self.prompts_per_shard or (1024 if torch.cuda.is_available() else 64)

    def get_sampling(self, stored: Round) -> SamplingConfig:
        """How the responses of a round, or of an evaluation, are sampled."""
        return self.val_sampling if stored.is_held_out else self.sampling


def downstream_settings(
    module: PolicyModule, options: RoundOptions, trainer: L.Trainer, data: RoundDataModule
) -> StageSettings:
    """Settings of all stages after `responses`; they are known before any weights load."""
    return {
        "rewards": {"reward": "those of the other run"} if options.from_other_run else _scoring_settings(options, data),
        "pairs": {
            **_selection_settings(module, options),
            **_shaping_settings(options.shaping),
            **({"drop_truncated": True} if options.drop_truncated else {}),
        },
        "logps": {
            "reference": module.reference_source.path if "reference_logps" in module.needs else None,
            **({} if options.old_logps == "policy" else {"old": options.old_logps}),
            **logps_settings(module),
            **({"token_logps": "of all scored responses"} if options.store_token_logps else {}),
        },
        "training": {
            **module.training_settings(),
            "pairs_per_update": data.pairs_per_update(trainer),
            **({} if data.passes == 1 else {"passes": data.passes}),
            **({} if data.updates_per_round is None else {"updates_per_round": data.updates_per_round}),
            "precision": str(trainer.precision),
            "gradient_clip_val": trainer.gradient_clip_val,
        },
    }


def _scoring_settings(options: RoundOptions, data: RoundDataModule) -> dict[str, Any]:
    return {
        "reward": options.reward.fingerprint(),
        **options.scoring.withheld,
        **({"chat_template_kwargs": data.chat_template_kwargs} if data.chat_template_kwargs else {}),
    }


def logps_settings(module: PolicyModule) -> dict[str, Any]:
    """How the log-probs that are computed differ from those of a pairwise loss: summed ones under pi_old."""
    per_token = sorted(set(module.needs) - {"rewards", *SUMMED, Z_REF})
    return {
        **({} if "old_logps" in module.needs else {"without": "old_logps"}),
        **({"per_token": per_token} if per_token else {}),
        **({"mismatched": ["reference_logps"]} if Z_REF in module.needs else {}),
        **getattr(module, "extra_pass_settings", dict)(),
    }


def pair_selector(module: PolicyModule, options: RoundOptions) -> PairSelector | None:
    """The pair selector; None where the loss trains on whole groups.

    Raises:
        InputError: A selector is given, but the loss takes no pairs.
    """
    if module.loss.uses_pairs:
        return options.selector or BestWorst()
    if options.selector is not None:
        raise InputError(
            f"`rollout.selector` is {type(options.selector).__name__}, but `model.loss` {type(module.loss).__name__} "
            "trains on all responses of a prompt, so no pairs are selected. Leave it out, or add "
            "`--rollout.selector null`."
        )
    return None


def check_responses(module: PolicyModule, options: RoundOptions) -> None:
    """Refuse fewer responses per prompt than the loss needs.

    Raises:
        InputError: `rollout.sampling.num_responses` is too small, or a refill has nothing to compare.
    """
    count, least = options.sampling.num_responses, module.loss.needs_responses
    loss = type(module.loss).__name__
    if count < least:
        raise InputError(
            f"`rollout.sampling.num_responses` is {count}, but `model.loss` {loss} compares the responses to a prompt "
            f"with each other: it must be {least} or more."
        )
    if options.reward.by_prompt and count < 2:
        raise InputError(
            f"`rollout.sampling.num_responses` must be 2 or more: {options.reward.name} compares the responses to a "
            "prompt with each other."
        )
    if options.refill and least < 2 and not options.drop_truncated:
        raise InputError(
            f"`rollout.refill` is {options.refill}, but `model.loss` {loss} does not compare the responses to a prompt "
            "with each other, so no prompt lacks anything. Leave it out, or set `rollout.drop_truncated`."
        )


def check_shaping(module: PolicyModule, options: RoundOptions) -> None:
    """Refuse shaping of rewards that neither the loss nor a selector of pairs reads, or that the loss undoes.

    Raises:
        InputError: `rollout.shaping` would have no effect.
    """
    if options.drop_truncated and (
        options.shaping.missing_eos_penalty or options.shaping.missing_eos_reward is not None
    ):
        raise InputError(
            "`rollout.drop_truncated` is true, so no truncated response is trained on, and `missing_eos_penalty` and "
            "`missing_eos_reward` of `rollout.shaping` would have no effect. Leave them out."
        )
    if module.loss.uses_pairs:
        return
    loss, shaping = type(module.loss).__name__, options.shaping
    if "rewards" not in module.needs and shaping != RewardShaping():
        raise InputError(
            f"`rollout.shaping` is set, but `model.loss` {loss} reads no rewards, so it would have no effect. Leave "
            "it out."
        )
    kinds = [term.normalizes for _, term in module.loss.terms if "rewards" in term.needs]
    undone = {"none": False, "round": all(kinds), "prompt": all(kind == "prompt" for kind in kinds)}
    if module.kl_coef == 0 and undone[shaping.normalize]:
        raise InputError(
            f"`rollout.shaping.normalize` is {shaping.normalize}, but the advantages of `model.loss` {loss} are "
            "normalised anyway, so it would have no effect. Leave it out."
        )


def drops_equal_groups(module: PolicyModule, options: RoundOptions) -> bool:
    """Whether rounds without pairs leave out prompts whose shaped rewards are all equal: others take their place."""
    compares = module.loss.needs_responses > 1 and "rewards" in module.needs
    return options.refill > 0 and compares


def _selection_settings(module: PolicyModule, options: RoundOptions) -> dict[str, Any]:
    selector = pair_selector(module, options)
    if selector is None:
        which = " of prompts with a difference in reward" if drops_equal_groups(module, options) else ""
        return {"groups": f"all scored responses{which}"}
    without_ties = selector.gives_ties and not module.loss.uses_ties
    return {"selector": describe(selector), **({"ties": False} if without_ties else {})}


def _shaping_settings(shaping: RewardShaping) -> dict[str, Any]:
    """Empty where shaping leaves the scores as they are."""
    return {} if shaping == RewardShaping() else {"shaping": vars(shaping)}


def held_out_sampling(
    sampling: SamplingConfig, num_responses: int | None, temperature: float | None, prompts: int = 0
) -> SamplingConfig:
    """How responses to held-out prompts are sampled.

    Args:
        sampling: How responses are sampled for training.
        num_responses: Responses to each prompt. None for one where they are decoded greedily. Otherwise for 2, or for
            as many, at most 8, as make 64 responses in all: the fewer the prompts, the more their means should tell.
        temperature: Temperature; None for that of training.
        prompts: Number of held-out prompts; 0 where it is not known.
    """
    temperature = sampling.temperature if temperature is None else temperature
    if num_responses is None:
        wanted = -(-_HELD_OUT_RESPONSES // prompts) if prompts else 2
        num_responses = 1 if temperature == 0 else min(max(2, wanted), 8)
    return replace(sampling, num_responses=num_responses, temperature=temperature)
