"""What stands between a reward and the round store: time limit, retries, finite numbers, a policy for failures."""

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal

from rlhf_pl.rewards.base import Failure, Reward, Sample
from rlhf_pl.rewards.combine import CombinedReward
from rlhf_pl.rewards.left_behind import contained
from rlhf_pl.rewards.process_state import KeptProcess, KeptSettings
from rlhf_pl.rewards.results import Outcome, cut, failure_of, scores_of
from rlhf_pl.rewards.time_limit import call_limited, ends_if_locked
from rlhf_pl.utils.console import warn
from rlhf_pl.utils.errors import LARGEST_REWARD, InputError
from rlhf_pl.utils.retries import Retries

MOST_GIVEN_UP = 3  # calls of a reward that do not let themselves be interrupted, before the run stops


@dataclass(frozen=True)
class ScoringConfig:
    """How rewards are called.

    Args:
        timeout_s: Time limit of one call, seconds; 0 for none. A call scores one answer, or for rewards that take a
            batch all answers of `prompts_per_call` prompts. A call that takes longer has failed, whatever it returns.
        retries: Further attempts after a failure.
        backoff_s: Pause before the second attempt, seconds; doubled before every further one.
        on_failure: What becomes of an answer whose reward failed: `error` stops the run, `drop` leaves the answer
            out of the pairs, a number is taken as its reward. Failures are counted in the round's manifest.
        prompts_per_call: Prompts whose answers a batched reward gets at a time.
        strip_thinking: Withhold from rewards what the policy thinks before it answers. An answer that ends inside its
            thinking counts as unfinished and empty.
        thinking_marks: What opens and what closes the thinking. It may be opened by the chat template.
        isolate: Run Python functions that are named by their import path in a process of their own, which is killed
            at the time limit and started anew: for code that can't be interrupted, crashes, or ends its process.
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
                f"`error`, `drop` or a number of at most {LARGEST_REWARD:g} in size",
            ),
        ]
        for name, holds, rule in rules:
            if not holds:
                raise InputError(f"`rollout.scoring.{name}` must be {rule}, got {getattr(self, name)}.")

    @property
    def withheld(self) -> dict[str, Any]:
        """What a manifest notes of what rewards do not get to see."""
        return {"strip_thinking": list(self.thinking_marks)} if self.strip_thinking else {}

    @property
    def substitute(self) -> float | None:
        """The reward of an answer that failed; None leaves it out."""
        return None if isinstance(self.on_failure, str) else float(self.on_failure)


def guarded_scores(
    reward: Reward,
    samples: Sequence[Sample],
    config: ScoringConfig,
    done: Callable[[list[Outcome]], None] = lambda outcomes: None,
) -> list[Outcome]:
    """One outcome per sample, in their order; never a made-up number.

    Args:
        reward: Called on all samples, or one by one if it says so (`Reward.one_by_one`).
        samples: What to score.
        config: Limits, and what to do about failures.
        done: Gets the outcomes of each call as they come.

    Raises:
        InputError: An answer has no reward and `on_failure` is `error`; names prompt_id, reason and the choices. Or
            three calls did not let themselves be interrupted, or the reward can't be opened.
    """
    outcomes: list[Outcome] = []
    calls = [[sample] for sample in samples] if reward.one_by_one else [list(samples)]
    with KeptProcess(), ends_if_locked(config.timeout_s):
        for call in calls:
            found = [_decide(reward, s, o, config) for s, o in zip(call, _score(reward, call, config), strict=True)]
            done(found)
            outcomes += found
    return outcomes


def _decide(reward: Reward, sample: Sample, outcome: Outcome, config: ScoringConfig) -> Outcome:
    if isinstance(outcome, Failure) and config.on_failure == "error":
        raise InputError(
            f"Reward `{reward.name}` failed for prompt_id {sample.prompt_id!r}, answer {cut(sample.response, 80)!r}: "
            f"{outcome.detail} The policy for failures is `error`; with --rollout.scoring.on_failure drop such answers "
            "are left out, with a number that is their reward."
        )
    return outcome


def _score(reward: Reward, batch: list[Sample], config: ScoringConfig) -> list[Outcome]:
    """Call with retries of what failed; a batch that fails as a whole is split, so that a bad answer costs itself."""
    outcomes: dict[int, Outcome] = {}
    todo, whole = list(range(len(batch))), None
    for pause in chain([0.0], Retries(config.retries, config.backoff_s).pauses()):
        time.sleep(pause)
        found = _call(reward, [batch[i] for i in todo], config.timeout_s)
        whole = found if isinstance(found, Failure) else None
        if not isinstance(found, Failure):
            outcomes |= dict(zip(todo, found, strict=True))
            todo = _to_retry(reward, batch, outcomes)
        if not todo or (whole is not None and whole.final):
            break
    if whole is not None:
        rest = [batch[i] for i in todo]
        units = _units(reward, rest)
        if len(units) == 1 or whole.final or whole.kind == "wrong_count":  # nobody can tell whose scores these are
            outcomes |= dict.fromkeys(todo, whole)
        else:
            outcomes |= dict(zip(todo, _split(reward, units, whole, config.timeout_s, []), strict=True))
    return [outcomes[i] for i in range(len(batch))]


def _to_retry(reward: Reward, batch: list[Sample], outcomes: dict[int, Outcome]) -> list[int]:
    """Answers to score once more: those that failed, with the others of their prompt where these belong together."""
    failed = [i for i, o in sorted(outcomes.items()) if isinstance(o, Failure) and not o.final]
    if not reward.by_prompt:
        return failed
    prompts = {batch[i].prompt_id for i in failed}
    return [i for i, sample in enumerate(batch) if sample.prompt_id in prompts]


def _units(reward: Reward, batch: list[Sample]) -> list[list[Sample]]:
    """What may be scored apart: single answers, or all answers to a prompt."""
    if not reward.by_prompt:
        return [[sample] for sample in batch]
    units: list[list[Sample]] = []
    for sample in batch:
        if units and units[-1][0].prompt_id == sample.prompt_id:
            units[-1].append(sample)
        else:
            units.append([sample])
    return units


def _split(
    reward: Reward, units: list[list[Sample]], failure: Failure, timeout_s: float, hung: list[Failure]
) -> list[Outcome]:
    """Halve a failed batch until the answers stand alone that fail. Three that hang alone speak for all the rest."""
    if len(units) == 1 or failure.final or len(hung) >= 3:
        if failure.kind == "timeout":
            hung.append(failure)
        return [failure] * sum(map(len, units))
    found: list[Outcome] = []
    for half in (units[: len(units) // 2], units[len(units) // 2 :]):
        samples = [sample for unit in half for sample in unit]
        outcomes = failure if len(hung) >= 3 else _call(reward, samples, timeout_s)
        found += outcomes if isinstance(outcomes, list) else _split(reward, half, outcomes, timeout_s, hung)
    return found


def _call(reward: Reward, batch: list[Sample], timeout_s: float) -> list[Outcome] | Failure:
    """One call: an outcome per sample, or the failure of the whole."""
    with KeptSettings():
        opened = call_limited(reward.open, 0, reward.name)
    if opened.error is not None:
        failure = _failure(opened.error, timeout_s, reward.name)
        raise InputError(f"Reward `{reward.name}` can't be opened: {failure.detail}") from opened.error
    if reward.limits_itself and threading.current_thread() is not threading.main_thread():
        timeout_s = 0
    with KeptSettings():
        ended = call_limited(lambda: _contained(reward, batch), timeout_s, reward.name)
    if ended.given_up:
        return _given_up(reward, timeout_s)
    if ended.timed_out:
        return _timed_out(ended.swallowed, timeout_s)
    if ended.error is not None:
        return _failure(ended.error, timeout_s, reward.name)
    assert ended.value is not None
    return ended.value


def _contained(reward: Reward, batch: list[Sample]) -> list[Outcome]:
    with contained():
        return scores_of(reward, batch)


def _failure(error: BaseException, timeout_s: float, name: str) -> Failure:
    """What a call has failed of; to tell an exception's text is users' code as well."""
    told = call_limited(lambda: failure_of(error), timeout_s, name)
    return told.value or Failure("exception", f"{type(error).__name__}, whose text can't be had.")


def _timed_out(swallowed: bool, timeout_s: float) -> Failure:
    """Not tried again if it would take any failure inside it for a score, as it did the interrupt."""
    advice = " It was interrupted, and returned all the same: write `except Exception` there rather than `except`."
    late = f"no result within {timeout_s:g} s (rollout.scoring.timeout_s)."
    return Failure("timeout", late + advice * swallowed, final=swallowed)


def _given_up(reward: Reward, timeout_s: float) -> Failure:
    """A call that would not be interrupted: not tried again, and after some of these the run stops."""
    reward._given_up += 1
    what = (
        f"no result within {timeout_s:g} s (rollout.scoring.timeout_s), and it did not let itself be interrupted, so "
        "that the call was given up."
    )
    warn(f"Reward `{reward.name}`: {what}")
    if reward._given_up >= MOST_GIVEN_UP:
        raise InputError(
            f"Reward `{reward.name}`: {what} That was so {reward._given_up} times now, so the run stops, whatever the "
            "policy for failures is. Let exceptions through that are no `Exception` (write `except Exception` rather "
            "than `except`), or run the function in a process of its own with --rollout.scoring.isolate true."
        )
    return Failure("timeout", what, final=True)


_TRIED = 24  # samples that a reward is called with, of those it is checked with


def try_reward(reward: Reward, samples: Sequence[Sample], config: ScoringConfig) -> None:
    """Check a reward on real prompts with made-up answers, so that one that can't work is found before a model loads.

    Raises:
        InputError: Says what is wrong.
    """
    reward.check(samples)
    for part in reward.parts if isinstance(reward, CombinedReward) else [reward]:
        if part.trial and config.on_failure == "error":
            try:
                guarded_scores(part, samples[:_TRIED], replace(config, retries=0))
            except InputError as error:
                raise InputError(f"{error} (Found by a trial call before loading any model.)") from error
