"""Whose log-probs a round trains with: those of pi_old, and those of the policy that sampled its responses."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from rlhf_pl.algorithms.prompt_groups import SAMPLING_LOGPS
from rlhf_pl.data.policy_module import PolicyModule
from rlhf_pl.rollout import SamplingConfig
from rlhf_pl.rollout.base import LOGP_TEMPERATURE
from rlhf_pl.rounds.settings import RoundOptions
from rlhf_pl.rounds.stages.sampler_logps import has_token_logps
from rlhf_pl.rounds.stored_rounds import is_off_policy
from rlhf_pl.store.round_store import Round
from rlhf_pl.utils.errors import InputError


@dataclass(frozen=True)
class LogpsOrigins:
    """Where the log-probs of a round come from.

    Args:
        old: Those of pi_old: `policy` for a forward pass of this run's policy before the round; `sampler` for what the
            sampler reported; `other_run` for what the run has stored that the round comes from; None if not needed.
        sampling: Those of the policy that sampled the responses: `sampler`; `other_run`; `old` where that is pi_old;
            None if not needed.
    """

    old: Literal["policy", "sampler", "other_run"] | None
    sampling: Literal["sampler", "other_run", "old"] | None


def find_origins(stored: Round, needs: Collection[str], options: RoundOptions) -> LogpsOrigins:
    """Where the log-probs of a round, or of held-out pairs, come from; its responses are complete."""
    is_corrected, off_policy = SAMPLING_LOGPS in needs, is_off_policy(stored)
    old: Literal["policy", "sampler", "other_run"] | None = None
    if "old_logps" in needs:
        old = "other_run" if off_policy and not is_corrected else "policy"
        old = "sampler" if takes_sampler_logps(stored, needs, options) else old
    sampling: Literal["sampler", "other_run", "old"] | None = None
    if is_corrected:
        is_stored = not stored.is_held_out and (has_token_logps(stored) or not options.from_other_run)
        sampling = "sampler" if is_stored else "other_run" if off_policy else "old"
    return LogpsOrigins(old, sampling)


def takes_sampler_logps(stored: Round, needs: Collection[str], options: RoundOptions) -> bool:
    """Whether the sampler's log-probs serve as those of pi_old.

    For held-out pairs they do where they are of whole responses, and sampled at the temperature of these log-probs.
    """
    if options.old_logps != "sampler" or options.get_sampling(stored).temperature != LOGP_TEMPERATURE:
        return False
    return not (stored.is_held_out and "old_token_logps" in needs)


def stores_sampled_tokens(stored: Round, needs: Collection[str], options: RoundOptions) -> bool:
    """Whether the sampler's log-prob of every token is stored with the responses of a round that is sampled here."""
    is_sampled = not stored.is_held_out and not options.from_other_run
    return is_sampled and reads_sampled_tokens(needs, options)


def reads_sampled_tokens(needs: Collection[str], options: RoundOptions) -> bool:
    """Whether the training reads the sampler's log-prob of every token."""
    return SAMPLING_LOGPS in needs or (options.old_logps == "sampler" and "old_token_logps" in needs)


def has_foreign_pi_old(stored: Round, needs: Collection[str]) -> bool:
    """Whether pi_old is the policy of another run, rather than this run's before the round."""
    return is_off_policy(stored) and SAMPLING_LOGPS not in needs


# checks of the options, before anything loads


def check_old_logps(module: PolicyModule, options: RoundOptions) -> None:
    """Refuse the sampler's log-probs as those of pi_old where the loss uses none, or corrects for the difference.

    Raises:
        InputError: `rollout.old_logps` is sampler, which the loss has no use for.
    """
    if options.old_logps == "policy":
        return
    loss = type(module.loss).__name__
    if "old_logps" not in module.needs:
        raise InputError(
            f"`rollout.old_logps` is sampler, but `model.loss` {loss} uses no log-probs of the policy that sampled "
            "the round, so the option would have no effect. Leave it out."
        )
    if SAMPLING_LOGPS in module.needs:
        raise InputError(
            f"`rollout.old_logps` is sampler, and `model.loss` {loss} has importance weights pi_old / pi_sampling "
            "(`model.loss.correction`): pi_old would be the sampler, and all weights 1. Set `rollout.old_logps` to "
            "policy, or leave `model.loss.correction` out."
        )


def check_token_logps(module: PolicyModule, options: RoundOptions) -> None:
    """Refuse to store the log-probs of all tokens where none are computed, or all are stored anyway.

    Raises:
        InputError: `rollout.store_token_logps` would have no effect.
    """
    if not options.store_token_logps:
        return
    reason = ""
    if options.old_logps == "sampler":
        reason = "`rollout.old_logps` is sampler, so that no forward pass computes those of pi_old"
    elif not module.loss.uses_pairs and "old_token_logps" in module.needs:
        reason = f"`model.loss` {type(module.loss).__name__} needs them of all responses, so they are stored anyway"
    if reason:
        raise InputError(f"`rollout.store_token_logps` is true, but {reason}. Leave it out.")


_USES = {  # what the sampler's log-probs are for: (the options, what to do else)
    "old": ("`rollout.old_logps` is sampler", "set `rollout.old_logps` to policy"),
    "sampling": (
        "`model.loss` has importance weights for the sampler's log-probs (`model.loss.correction`)",
        "leave `model.loss.correction` out",
    ),
}


def check_sampler_logps(
    sampling: SamplingConfig, reshapes: Sequence[str] = (), use: Literal["old", "sampling"] = "old"
) -> None:
    """Refuse the sampler's log-probs if it samples from another distribution than it reports.

    Args:
        sampling: How responses are sampled for training.
        reshapes: What else changes the sampler's distribution, from `Sampler.reshapes()`.
        use: What they are for: those of pi_old, or those that importance weights are relative to.

    Raises:
        InputError: The temperature differs, or the distribution is truncated or reshaped.
    """
    what, instead = _USES[use]
    if sampling.temperature != LOGP_TEMPERATURE:
        raise InputError(
            f"{what}, but `rollout.sampling.temperature` is {sampling.temperature}, and samplers report log-probs at "
            f"temperature 1. Set it to 1, or {instead}."
        )
    if reshaped := [*list_truncations(sampling), *(f"`rollout.sampler`: {option}" for option in reshapes)]:
        raise InputError(
            f"{what}, but {' and '.join(reshaped)}: responses are then sampled from another distribution than the one "
            "whose log-probs the sampler reports, that over the whole vocabulary at temperature 1. Turn it off, or "
            f"{instead}."
        )


def check_other_runs_sampling(path: str, sampling: SamplingConfig) -> None:
    """Refuse importance weights for the rounds of a run that sampled from truncated distributions.

    Raises:
        InputError: Its log-probs, over the whole vocabulary, are not those that the responses were sampled with.
    """
    if truncated := list_truncations(sampling):
        raise InputError(
            f"{_USES['sampling'][0]}, but the responses of `--rounds_from` {path!r} were sampled from another "
            f"distribution than its log-probs are of: {' and '.join(truncated)} there. Leave `model.loss.correction` "
            "out."
        )


def list_truncations(sampling: SamplingConfig) -> list[str]:
    """The options, with values, that sample from a part of the vocabulary."""
    plain = SamplingConfig()
    return [
        f"`rollout.sampling.{name}` is {getattr(sampling, name)} (off: {getattr(plain, name):g})"
        for name in ("top_p", "top_k", "min_p")
        if getattr(sampling, name) != getattr(plain, name)
    ]
