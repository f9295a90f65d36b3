"""What rewards return, as plain numbers: one finite number per answer, or why there is none."""

import inspect
import numbers
from collections.abc import Mapping, Sequence
from contextlib import suppress
from decimal import Decimal
from typing import Any

from rlhf_pl.rewards.base import MAX_NAME, Failure, Reward, RewardResult, Sample
from rlhf_pl.rewards.copies import own_copies
from rlhf_pl.utils.errors import LARGEST_REWARD, InputError
from rlhf_pl.utils.terminal import summary

Outcome = RewardResult | Failure
_TEXT = (str, bytes, bytearray, memoryview)
_MOST_TOKENS = 2**31 - 1  # what the store's column holds
_SHOWN = 200  # characters of a wrong value that an error shows


class CallFailed(Exception):
    """A call of a reward failed as a whole."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.detail)
        self.failure = failure


def scores_of(reward: Reward, batch: Sequence[Sample]) -> list[Outcome]:
    """Call a reward with copies of the samples, which it may change.

    Raises:
        CallFailed: What it returned is not one result per sample. Whatever the reward raises is not caught.
    """
    return outcomes_of(reward.score(own_copies(batch)), batch)


def outcomes_of(values: Any, batch: Sequence[Sample]) -> list[Outcome]:
    """A sequence, or an array with one dimension, of numbers, results or failures: one outcome per sample.

    Raises:
        CallFailed: It is something else, or has another length.
    """
    items = _items(values, len(batch))
    if len(items) != len(batch):
        raise CallFailed(
            Failure(
                "wrong_count",
                f"returned {len(items)} scores for {len(batch)} answers (prompt_id {batch[0].prompt_id!r} to "
                f"{batch[-1].prompt_id!r}); it must return one per answer, in their order.",
            )
        )
    return [_finite(item) for item in items]


def _items(values: Any, count: int) -> list[Any]:
    shape = getattr(values, "shape", None)
    if isinstance(values, _TEXT) or not isinstance(shape, tuple):
        if isinstance(values, Sequence) and not isinstance(values, _TEXT):
            return list(values)
        raise _wrong_type(shown(values), count)
    if len(shape) == 2 and shape[1] == 1 and hasattr(values, "reshape"):  # as the heads of reward models give them
        values = values.reshape(-1)
    if len(values.shape) == 1:
        return _of_array(values)
    raise _wrong_type(f"an array of shape {tuple(shape)}", count)


def _of_array(values: Any) -> list[Any]:
    """The elements of an array, series or tensor; of numbers as such, so that dates don't become some."""
    kind = getattr(getattr(values, "dtype", None), "kind", "O")
    if kind not in "biufO":
        raise CallFailed(Failure("wrong_type", f"returned an array of {values.dtype}; it must hold numbers.", True))
    listed = values.tolist() if hasattr(values, "tolist") else list(values)
    return list(listed)


def _wrong_type(what: str, count: int) -> CallFailed:
    return CallFailed(
        Failure(
            "wrong_type",
            f"returned {what}; a reward that takes a batch must return a list of {count} numbers (or a tuple, an array "
            "or a tensor with one dimension), one per answer, in their order.",
            final=True,
        )
    )


def _finite(result: Any) -> Outcome:
    """A result as plain floats; numbers are taken for rewards without components."""
    if isinstance(result, Failure):
        return result
    try:
        reward = number(getattr(result, "reward", result), "")
        components = _components(getattr(result, "components", {}))
        truncated = _count(getattr(result, "truncated_tokens", 0))
    except CallFailed as failed:
        return failed.failure
    for name, value in (("", reward), *components.items()):
        if not abs(value) <= LARGEST_REWARD:
            which = f" as component `{name}`" if name else ""
            rule = f"Every score must be a finite number, of at most {LARGEST_REWARD:g} in size."
            return Failure("not_finite", f"returned {value}{which}. {rule}")
    return RewardResult(reward, components, truncated)


def _components(found: Any) -> dict[str, float]:
    if not isinstance(found, Mapping):
        raise CallFailed(
            Failure("exception", f"returned {shown(found)} as components; they must be numbers by their names.")
        )
    named = {summary(clean(str(name)), MAX_NAME): value for name, value in found.items()}
    return {name: number(value, name) for name, value in named.items()}


def _count(found: Any) -> int:
    if isinstance(found, numbers.Integral) and 0 <= int(found) <= _MOST_TOKENS:
        return int(found)
    raise CallFailed(Failure("exception", f"returned {shown(found)} as truncated_tokens; it must be a count."))


def number(value: Any, component: str) -> float:
    """One number as a float: Python's or numpy's, a Decimal or a Fraction, or an array or tensor that holds one.

    Raises:
        CallFailed: It is something else, or larger than floats are.
    """
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and all(length == 1 for length in shape) and hasattr(value, "item"):
        value = value.item()
    which = f" as component `{component}`" if component else ""
    if not isinstance(value, numbers.Real | Decimal):
        close = getattr(value, "close", None)
        if inspect.iscoroutine(value) and callable(close):
            close()
        advice = " Await it, as with asyncio.run()." if inspect.isawaitable(value) else ""
        kind = type(value).__name__
        raise CallFailed(Failure("exception", f"returned {shown(value)} ({kind}){which}, which is no number.{advice}"))
    try:
        return float(value)
    except (OverflowError, ValueError, TypeError, ArithmeticError) as error:
        kind = "not_finite" if isinstance(error, OverflowError) else "exception"
        raise CallFailed(
            Failure(kind, f"returned {shown(value)}{which}, which can't be made a floating-point number ({error}).")
        ) from error


def failure_of(error: BaseException) -> Failure:
    """What a call that raised has failed of."""
    if isinstance(error, CallFailed):
        return error.failure
    if isinstance(error, InputError):
        return Failure("exception", str(error))
    kind, text = type(error).__name__, _text(error)
    if isinstance(error, Exception):
        return Failure("exception", f"{kind}: {text}.")
    advice = "Raise an `Exception`, and call nothing that ends the process, such as sys.exit()."
    return Failure("exception", f"raised {kind}({text}), which is meant to end the run. {advice}", final=True)


def _text(error: BaseException) -> str:
    try:
        return clean(str(error))
    except Exception:  # users' classes may fail at anything
        return "(its text can't be had)"


def shown(value: Any) -> str:
    """A value's text for an error, if it can be had, and not more than a line of it."""
    text = f"a {type(value).__name__}"
    with suppress(Exception):  # users' classes may fail at anything, and long integers have no text
        text = clean(repr(value))
    return cut(text, _SHOWN)


def cut(text: str, limit: int) -> str:
    """A text of at most so many characters."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def clean(text: str) -> str:
    """Without halves of characters, which no file can hold."""
    return text.encode("utf-8", "replace").decode()
