"""Calls of rewards with a time limit, retries, checks of the scores, and a policy for failures."""

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal

from rlhf_pl.rewards.base import Failure, Reward, Sample
from rlhf_pl.rewards.combine import CombinedReward
from rlhf_pl.rewards.process_exit import contain_process_exit
from rlhf_pl.rewards.process_state import ProcessGuard, SettingsGuard
from rlhf_pl.rewards.results import Outcome, make_failure, score_copies, truncate_text
from rlhf_pl.rewards.time_limit import call_with_time_limit, exit_if_gil_is_held
from rlhf_pl.utils.console import warn
from rlhf_pl.utils.errors import LARGEST_REWARD, InputError
from rlhf_pl.utils.retries import Retries

MAX_ABANDONED_CALLS = 3  # the run stops after this many calls of a reward that can't be interrupted


@dataclass(frozen=True)
class ScoringConfig:
    """How rewards are called.

    Args:
        timeout_s: Time limit of one call, seconds; 0 for no limit. A call scores one response or, for a batched reward,
            all responses to `prompts_per_call` prompts. A call that takes longer has failed, whatever it returns.
        retries: Further attempts after a failure.
        backoff_s: Pause before the second attempt, seconds; doubled before each further attempt.
        on_failure: What happens to a response whose reward failed: `error` stops the run, `drop` excludes the response
            from pairs, a number becomes its reward. The round's manifest counts failures.
        prompts_per_call: Number of prompts whose responses a batched reward receives per call.
        strip_thinking: Whether thinking is removed from the responses that rewards see. A response that ends inside its
            thinking counts as unfinished and empty.
        thinking_marks: The texts that open and close thinking. The chat template may write the opening one.
        isolate: Whether Python functions that are given by their import path run in a separate process, which is
            killed at the time limit and restarted: for code that can't be interrupted, crashes, or exits.
    """

    timeout_s: float = 600.0
    retries: int = 2
    backoff_s: float = 1.0
    on_failure: Literal["error", "drop"] | float = "error"
    prompts_per_call: int = 16
    strip_thinking: bool = False
    thinking_marks: tuple[str, str] = ("<think>", "</think>")
    isolate: bool = False

    def __post_init__(self) -> None:
        rules = [
            ("thinking_marks", all(self.thinking_marks) and len(set(self.thinking_marks)) == 2, "two different texts"),
            ("timeout_s", math.isfinite(self.timeout_s) and self.timeout_s >= 0, "0 (no limit) or more seconds"),
            ("retries", self.retries >= 0, "0 or more"),
            ("backoff_s", math.isfinite(self.backoff_s) and self.backoff_s >= 0, "0 or more seconds"),
            ("prompts_per_call", self.prompts_per_call >= 1, "1 or more"),
            (
                "on_failure",
                self.on_failure in ("error", "drop")
                or (not isinstance(self.on_failure, str) and abs(self.on_failure) <= LARGEST_REWARD),
                f"`error`, `drop` or a number with an absolute value of at most {LARGEST_REWARD:g}",
            ),
        ]
        for name, holds, rule in rules:
            if not holds:
                raise InputError(f"`rollout.scoring.{name}` must be {rule}, got {getattr(self, name)}.")

    @property
    def withheld(self) -> dict[str, Any]:
        """The manifest's entry about text that rewards do not see."""
        return {"strip_thinking": list(self.thinking_marks)} if self.strip_thinking else {}

    @property
    def substitute(self) -> float | None:
        """The reward of a response whose scoring failed; None if it has none."""
        return None if isinstance(self.on_failure, str) else float(self.on_failure)


def score_samples(
    reward: Reward,
    samples: Sequence[Sample],
    config: ScoringConfig,
    on_outcomes: Callable[[list[Outcome]], None] = lambda outcomes: None,
) -> list[Outcome]:
    """Score samples: one outcome per sample, in order; never a made-up number.

    Args:
        reward: Called on all samples, or on one at a time (`Reward.one_by_one`).
        samples: Samples to score.
        config: Limits, and the policy for failures.
        on_outcomes: Receives the outcomes of each call when it returns.

    Raises:
        InputError: A response has no reward and `on_failure` is `error`; names prompt_id, reason and the choices. Or
            three calls could not be interrupted, or the reward can't be opened.
    """
    outcomes: list[Outcome] = []
    calls = [[sample] for sample in samples] if reward.one_by_one else [list(samples)]
    with ProcessGuard(), exit_if_gil_is_held(config.timeout_s):
        for call in calls:
            scored = zip(call, _score_with_retries(reward, call, config), strict=True)
            found = [_apply_policy(reward, sample, outcome, config) for sample, outcome in scored]
            on_outcomes(found)
            outcomes += found
    return outcomes


def _apply_policy(reward: Reward, sample: Sample, outcome: Outcome, config: ScoringConfig) -> Outcome:
    if isinstance(outcome, Failure) and config.on_failure == "error":
        response = truncate_text(sample.response, 80)
        raise InputError(
            f"Reward `{reward.name}` failed for prompt_id {sample.prompt_id!r}, response {response!r}: "
            f"{outcome.detail} The policy for failures is `error`: --rollout.scoring.on_failure drop excludes such "
            "responses, and a number there is used as their reward."
        )
    return outcome


def _score_with_retries(reward: Reward, batch: list[Sample], config: ScoringConfig) -> list[Outcome]:
    """Score with retries. A batch that fails as a whole is split, so that only bad responses have no score."""
    outcomes: dict[int, Outcome] = {}
    todo, batch_failure = list(range(len(batch))), None
    for pause in chain([0.0], Retries(config.retries, config.backoff_s).pauses()):
        time.sleep(pause)
        found = _call(reward, [batch[i] for i in todo], config.timeout_s)
        batch_failure = found if isinstance(found, Failure) else None
        if not isinstance(found, Failure):
            outcomes |= dict(zip(todo, found, strict=True))
            todo = _find_retries(reward, batch, outcomes)
        if not todo or (batch_failure is not None and batch_failure.final):
            break
    if batch_failure is not None:
        units = _group_units(reward, [batch[i] for i in todo])
        has_unmatched_scores = batch_failure.kind == "wrong_count"
        if len(units) == 1 or batch_failure.final or has_unmatched_scores:
            outcomes |= dict.fromkeys(todo, batch_failure)
        else:
            outcomes |= dict(zip(todo, _score_halves(reward, units, batch_failure, config.timeout_s, []), strict=True))
    return [outcomes[i] for i in range(len(batch))]


def _find_retries(reward: Reward, batch: list[Sample], outcomes: dict[int, Outcome]) -> list[int]:
    """Indices of responses to retry: the failed ones, with the others to their prompts if scored together."""
    failed = [i for i, o in sorted(outcomes.items()) if isinstance(o, Failure) and not o.final]
    if not reward.by_prompt:
        return failed
    prompts = {batch[i].prompt_id for i in failed}
    return [i for i, sample in enumerate(batch) if sample.prompt_id in prompts]


def _group_units(reward: Reward, batch: list[Sample]) -> list[list[Sample]]:
    """The smallest batches that can be scored: single responses, or all responses to a prompt."""
    if not reward.by_prompt:
        return [[sample] for sample in batch]
    units: list[list[Sample]] = []
    for sample in batch:
        if units and units[-1][0].prompt_id == sample.prompt_id:
            units[-1].append(sample)
        else:
            units.append([sample])
    return units


def _score_halves(
    reward: Reward, units: list[list[Sample]], failure: Failure, timeout_s: float, timeouts: list[Failure]
) -> list[Outcome]:
    """Halve a failed batch until failing units are alone. If three time out alone, the others get the same failure."""
    if len(units) == 1 or failure.final or len(timeouts) >= 3:
        if failure.kind == "timeout":
            timeouts.append(failure)
        return [failure] * sum(map(len, units))
    found: list[Outcome] = []
    for half in (units[: len(units) // 2], units[len(units) // 2 :]):
        samples = [sample for unit in half for sample in unit]
        outcomes = failure if len(timeouts) >= 3 else _call(reward, samples, timeout_s)
        found += outcomes if isinstance(outcomes, list) else _score_halves(reward, half, outcomes, timeout_s, timeouts)
    return found


def _call(reward: Reward, batch: list[Sample], timeout_s: float) -> list[Outcome] | Failure:
    """Call the reward once: an outcome per sample, or the failure of the whole batch."""
    with SettingsGuard():
        opened = call_with_time_limit(reward.open, 0, reward.name)
    if opened.error is not None:
        failure = _describe_error(opened.error, timeout_s, reward.name)
        raise InputError(f"Reward `{reward.name}` can't be opened: {failure.detail}") from opened.error
    if reward.limits_itself and threading.current_thread() is not threading.main_thread():
        timeout_s = 0
    with SettingsGuard():
        result = call_with_time_limit(lambda: _score_contained(reward, batch), timeout_s, reward.name)
    if result.is_abandoned:
        return _record_abandoned_call(reward, timeout_s)
    if result.timed_out:
        return _describe_timeout(result.swallowed, timeout_s)
    if result.error is not None:
        return _describe_error(result.error, timeout_s, reward.name)
    assert result.value is not None
    return result.value


def _score_contained(reward: Reward, batch: list[Sample]) -> list[Outcome]:
    with contain_process_exit():
        return score_copies(reward, batch)


def _describe_error(error: BaseException, timeout_s: float, name: str) -> Failure:
    """The failure of a call that raised. An exception's text is made by users' code too, under the time limit."""
    result = call_with_time_limit(lambda: make_failure(error), timeout_s, name)
    return result.value or Failure("exception", f"{type(error).__name__}, whose text is not available.")


def _describe_timeout(swallowed: bool, timeout_s: float) -> Failure:
    """The failure of a call over its time limit; final if the call swallowed the interrupt."""
    advice = " It swallowed the interrupt: write `except Exception` instead of `except`."
    late = f"no result within {timeout_s:g} s (rollout.scoring.timeout_s)."
    return Failure("timeout", late + advice * swallowed, final=swallowed)


def _record_abandoned_call(reward: Reward, timeout_s: float) -> Failure:
    """The failure of a call that could not be interrupted, without a retry; after several of them the run stops."""
    reward._abandoned_calls += 1
    what = (
        f"no result within {timeout_s:g} s (rollout.scoring.timeout_s), and it could not be interrupted, so the "
        "call was abandoned."
    )
    warn(f"Reward `{reward.name}`: {what}")
    if reward._abandoned_calls >= MAX_ABANDONED_CALLS:
        raise InputError(
            f"Reward `{reward.name}`: {what} This happened {reward._abandoned_calls} times, so the run stops, whatever "
            "the policy for failures. Don't catch what is not an `Exception` (write `except Exception` instead of "
            "`except`), or run the function in a separate process with --rollout.scoring.isolate true."
        )
    return Failure("timeout", what, final=True)


_TRIAL_SAMPLES = 24  # at most this many samples are scored in a trial


def try_reward(reward: Reward, samples: Sequence[Sample], config: ScoringConfig) -> None:
    """Check a reward on real prompts with made-up responses, to find errors before any model loads.

    Raises:
        InputError: The reward fails.
    """
    reward.check(samples)
    for part in reward.parts if isinstance(reward, CombinedReward) else [reward]:
        if part.trial and config.on_failure == "error":
            try:
                score_samples(part, samples[:_TRIAL_SAMPLES], replace(config, retries=0))
            except InputError as error:
                raise InputError(f"{error} (Found by a trial call before loading any model.)") from error
