"""What stands between a reward and the round store: time limit, retries, finite numbers, a policy for failures."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

from rlhf_pl.errors import LARGEST_REWARD, InputError
from rlhf_pl.rewards.base import MAX_NAME, Failure, Reward, RewardResult, Sample
from rlhf_pl.rewards.combine import CombinedReward
from rlhf_pl.terminal import summary


@dataclass(frozen=True)
class ScoringConfig:
    """How rewards are called.

    Args:
        timeout_s: Time limit of one call, seconds; 0 for none. A call scores one answer, or for rewards that take a
            batch all answers of `prompts_per_call` prompts.
        retries: Further attempts after a failure.
        backoff_s: Pause before the second attempt, seconds; doubled before every further one.
        on_failure: What becomes of an answer whose reward failed: `error` stops the run, `drop` leaves the answer
            out of the pairs, a number is taken as its reward. Failures are counted in the round's manifest.
        prompts_per_call: Prompts whose answers a batched reward gets at a time.
        strip_thinking: Withhold from rewards what the policy thinks before it answers. An answer that ends inside its
            thinking counts as unfinished and empty.
        thinking_marks: What opens and what closes the thinking. It may be opened by the chat template.
    """

    timeout_s: float = 600.0
    retries: int = 2
    backoff_s: float = 1.0
    on_failure: Literal["error", "drop"] | float = "error"
    prompts_per_call: int = 16
    strip_thinking: bool = False
    thinking_marks: tuple[str, str] = ("<think>", "</think>")

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


class RewardTimeout(BaseException):
    """The time limit is over. Not an Exception, so that a reward's own `except Exception` lets it through."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise RewardTimeout in the block after `seconds`; 0 for no limit. Only the main thread can be interrupted."""
    if seconds == 0 or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise RewardTimeout

    started = time.monotonic()
    handler = signal.signal(signal.SIGALRM, stop)
    remaining, interval = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # again, in case the first was swallowed
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if remaining:  # somebody else's alarm
            signal.setitimer(signal.ITIMER_REAL, max(0.001, remaining - (time.monotonic() - started)), interval)


Outcome = RewardResult | Failure


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
        InputError: An answer has no reward and `on_failure` is `error`; names prompt_id, reason and the choices.
    """
    reward.open()
    outcomes: list[Outcome] = []
    calls = [[sample] for sample in samples] if reward.one_by_one else [list(samples)]
    for call in calls:
        found = [_decide(reward, s, o, config) for s, o in zip(call, _score(reward, call, config), strict=True)]
        done(found)
        outcomes += found
    return outcomes


def _decide(reward: Reward, sample: Sample, outcome: Outcome, config: ScoringConfig) -> Outcome:
    if isinstance(outcome, Failure) and config.on_failure == "error":
        raise InputError(
            f"Reward `{reward.name}` failed for prompt_id {sample.prompt_id!r}, answer {_shorten(sample.response)!r}: "
            f"{outcome.detail} The policy for failures is `error`; with --rollout.scoring.on_failure drop such answers "
            "are left out, with a number that is their reward. Answers scored so far are kept."
        )
    return outcome


def _score(reward: Reward, batch: list[Sample], config: ScoringConfig) -> list[Outcome]:
    """Call with retries of what failed; a batch that fails as a whole is split, so that a bad answer costs itself."""
    outcomes: dict[int, Outcome] = {}
    todo, whole = list(range(len(batch))), None
    for attempt in range(config.retries + 1):
        if attempt:
            time.sleep(config.backoff_s * 2 ** (attempt - 1))
        found = _call(reward, [batch[i] for i in todo], config.timeout_s)
        whole = found if isinstance(found, Failure) else None
        if not isinstance(found, Failure):
            outcomes |= dict(zip(todo, found, strict=True))
            todo = _to_retry(reward, batch, outcomes)
            if not todo:
                break
    if whole is not None:
        rest = [batch[i] for i in todo]
        units = _units(reward, rest)
        if len(units) == 1 or whole.kind == "wrong_count":  # nobody can tell whose scores these are
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
    if len(units) == 1 or len(hung) >= 3:
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
    try:
        with time_limit(timeout_s):
            results = list(reward.score(batch))
    except RewardTimeout:
        return Failure("timeout", f"no result within {timeout_s:g} s (rollout.scoring.timeout_s).")
    except Exception as error:  # users' code may raise anything
        text = str(error)
        return Failure("exception", text if isinstance(error, InputError) else f"{type(error).__name__}: {text}.")
    if len(results) != len(batch):
        return Failure(
            "wrong_count",
            f"returned {len(results)} scores for {len(batch)} answers (prompt_id {batch[0].prompt_id!r} to "
            f"{batch[-1].prompt_id!r}); it must return one per answer, in their order.",
        )
    return [_finite(result) for result in results]


def _finite(result: Any) -> Outcome:
    """A result as plain floats; numbers are taken for rewards without components."""
    if isinstance(result, Failure):
        return result
    try:
        reward = float(getattr(result, "reward", result))
        components = {summary(k, MAX_NAME): float(v) for k, v in getattr(result, "components", {}).items()}
    except (TypeError, ValueError) as error:
        return Failure("exception", f"returned {result!r}, which is no number ({error}).")
    for name, value in (("", reward), *components.items()):
        if not abs(value) <= LARGEST_REWARD:
            which = f" as component `{name}`" if name else ""
            rule = f"Every score must be a finite number, of at most {LARGEST_REWARD:g} in size."
            return Failure("not_finite", f"returned {value}{which}. {rule}")
    return RewardResult(reward, components, int(getattr(result, "truncated_tokens", 0)))


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


def _shorten(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
