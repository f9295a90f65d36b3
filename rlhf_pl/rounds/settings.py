"""What rounds are made with, as the options say, and as a manifest notes it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import lightning as L
import torch

from rlhf_pl.algorithms.pair_selection import BestWorst, PairSelector
from rlhf_pl.algorithms.prompt_groups import PER_TOKEN
from rlhf_pl.algorithms.reward_shaping import RewardShaping
from rlhf_pl.data.policy_module import PolicyModule
from rlhf_pl.data.round_datamodule import RoundDataModule
from rlhf_pl.rewards import Reward, ScoringConfig
from rlhf_pl.rollout import SamplingConfig
from rlhf_pl.rollout.base import NOTED_TEMPERATURE
from rlhf_pl.store.provenance import StageSettings
from rlhf_pl.store.round_store import Round
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.fingerprints import describe


@dataclass(frozen=True)
class RoundOptions:
    """What `RoundRefresh` was given; see there."""

    reward: Reward
    scoring: ScoringConfig
    sampling: SamplingConfig
    val_sampling: SamplingConfig
    selector: PairSelector | None  # None: the default of a loss on pairs
    shaping: RewardShaping
    prompts_per_shard: int | None
    logps_batch_tokens: int
    old_logps: Literal["policy", "sampler"] = "policy"
    stream_shards: bool = False

    @property
    def shard_prompts(self) -> int:
        """Prompts of a shard: a minute or two of an engine's work."""
        return self.prompts_per_shard or (1024 if torch.cuda.is_available() else 64)

    def sampling_of(self, stored: Round) -> SamplingConfig:
        """How the prompts of a round, or of an evaluation, are answered."""
        return self.val_sampling if stored.is_held_out else self.sampling


def downstream_settings(
    module: PolicyModule, options: RoundOptions, trainer: L.Trainer, data: RoundDataModule
) -> StageSettings:
    """The settings of all stages after the answers, which are known before anything loads."""
    return {
        "rewards": {
            "reward": options.reward.fingerprint(),
            **options.scoring.withheld,
            **({"chat_template_kwargs": data.chat_template_kwargs} if data.chat_template_kwargs else {}),
        },
        "pairs": {**_selection(module, options), **_changed(options.shaping)},
        "logps": {
            "reference": module.reference_source.path if "reference_logps" in module.needs else None,
            **({} if options.old_logps == "policy" else {"old": options.old_logps}),
            **logps_settings(module),
        },
        "training": {
            **module.training_settings(),
            "pairs_per_update": data.pairs_per_update(trainer),
            **({} if data.passes == 1 else {"passes": data.passes}),
            "precision": str(trainer.precision),
            "gradient_clip_val": trainer.gradient_clip_val,
        },
    }


def logps_settings(module: PolicyModule) -> dict[str, Any]:
    """Which log-probs are computed beside those of a loss on pairs, which takes summed ones under pi_old."""
    per_token = sorted(name for name in module.needs if name in PER_TOKEN)
    return {
        **({} if "old_logps" in module.needs else {"without": "old_logps"}),
        **({"per_token": per_token} if per_token else {}),
    }


def pair_selector(module: PolicyModule, options: RoundOptions) -> PairSelector | None:
    """What picks pairs; None where whole groups are trained on.

    Raises:
        InputError: A selector is given that nothing asks.
    """
    if module.loss.per == "pair":
        return options.selector or BestWorst()
    if options.selector is not None:
        raise InputError(
            f"`rollout.selector` is {type(options.selector).__name__}, but `model.loss` {type(module.loss).__name__} "
            "trains on all responses of a prompt: no pairs are picked. Leave it out."
        )
    return None


def check_old_logps(module: PolicyModule, options: RoundOptions) -> None:
    """Refuse the sampler's log-probs where the loss takes none, or those of every token.

    Raises:
        InputError: `rollout.old_logps` is sampler, and the loss can't take what it reports.
    """
    if options.old_logps == "policy":
        return
    loss = type(module.loss).__name__
    if "old_token_logps" in module.needs:
        raise InputError(
            f"`rollout.old_logps` is sampler, but `model.loss` {loss} needs the log-probs of every token, and their "
            "sums alone are kept of the sampler's. Set it to policy."
        )
    if "old_logps" not in module.needs:
        raise InputError(
            f"`rollout.old_logps` is sampler, but `model.loss` {loss} takes no log-probs of the policy that sampled "
            "the round, so it would have no effect. Leave it out."
        )


def _selection(module: PolicyModule, options: RoundOptions) -> dict[str, Any]:
    selector = pair_selector(module, options)
    return {"groups": "all scored responses"} if selector is None else {"selector": describe(selector)}


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
