"""What rounds are made with, as the options say, and as a manifest notes it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import lightning as L
import torch

from rlhf_pl.algorithms.pair_selection import PairSelector
from rlhf_pl.algorithms.reward_shaping import RewardShaping
from rlhf_pl.data.round_datamodule import RoundDataModule
from rlhf_pl.modules.pairwise import RebelModule
from rlhf_pl.rewards import Reward, ScoringConfig
from rlhf_pl.rollout import SamplingConfig
from rlhf_pl.rollout.base import NOTED_TEMPERATURE
from rlhf_pl.store.provenance import StageSettings
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.fingerprints import describe


@dataclass(frozen=True)
class RoundOptions:
    """What `RoundRefresh` was given; see there."""

    reward: Reward
    scoring: ScoringConfig
    sampling: SamplingConfig
    val_sampling: SamplingConfig
    selector: PairSelector
    shaping: RewardShaping
    prompts_per_shard: int | None
    logps_batch_tokens: int
    old_logps: Literal["policy", "sampler"] = "policy"
    stream_shards: bool = False

    @property
    def shard_prompts(self) -> int:
        """Prompts of a shard: a minute or two of an engine's work."""
        return self.prompts_per_shard or (1024 if torch.cuda.is_available() else 64)


def downstream_settings(
    module: RebelModule, options: RoundOptions, trainer: L.Trainer, data: RoundDataModule
) -> StageSettings:
    """The settings of all stages after the answers, which are known before anything loads."""
    return {
        "rewards": {
            "reward": options.reward.fingerprint(),
            **options.scoring.withheld,
            **({"chat_template_kwargs": data.chat_template_kwargs} if data.chat_template_kwargs else {}),
        },
        "pairs": {"selector": describe(options.selector), **_changed(options.shaping)},
        "logps": {
            "reference": module.reference_source.path if module.kl_coef > 0 else None,
            **({} if options.old_logps == "policy" else {"old": options.old_logps}),
        },
        "training": {
            **module.training_settings(),
            "pairs_per_update": data.pairs_per_update(trainer),
            **({} if data.passes == 1 else {"passes": data.passes}),
            "precision": str(trainer.precision),
            "gradient_clip_val": trainer.gradient_clip_val,
        },
    }


def check_noted_logps(sampling: SamplingConfig, reshapes: Sequence[str] = ()) -> None:
    """What the sampler notes must be the log-probs that it draws by, if they are to be those of the old policy.

    Args:
        sampling: How responses are drawn for training.
        reshapes: `Sampler.reshapes()`.

    Raises:
        InputError: The temperature is another, or the distribution is truncated or reshaped.
    """
    if sampling.temperature != NOTED_TEMPERATURE:
        raise InputError(
            f"`rollout.old_logps` is sampler, but `rollout.sampling.temperature` is {sampling.temperature}: what "
            "samplers note is at temperature 1. Set one of them otherwise."
        )
    plain = SamplingConfig()
    reshaped = [
        f"`rollout.sampling.{name}` is {getattr(sampling, name)} (off: {getattr(plain, name):g})"
        for name in ("top_p", "top_k", "min_p")
        if getattr(sampling, name) != getattr(plain, name)
    ]
    reshaped += [f"`rollout.sampler`: {what}" for what in reshapes]
    if reshaped:
        raise InputError(
            f"`rollout.old_logps` is sampler, but {' and '.join(reshaped)}: responses are then drawn from another "
            "distribution than the one whose log-probs the sampler notes, that of the whole vocabulary at temperature "
            "1. Turn it off, or set `rollout.old_logps` to policy."
        )


def takes_noted_logps(options: RoundOptions, sampling: SamplingConfig) -> bool:
    """Whether the sampler's log-probs of responses drawn so count as the old policy's: there is one temperature."""
    return options.old_logps == "sampler" and sampling.temperature == NOTED_TEMPERATURE


def _changed(shaping: RewardShaping) -> dict[str, Any]:
    """Nothing where scores stay as they are."""
    return {} if shaping == RewardShaping() else {"shaping": vars(shaping)}


def held_out_sampling(sampling: SamplingConfig, num_responses: int, temperature: float | None) -> SamplingConfig:
    """How held-out prompts are answered; a temperature of None is that of training."""
    return replace(
        sampling,
        num_responses=num_responses,
        temperature=sampling.temperature if temperature is None else temperature,
    )
