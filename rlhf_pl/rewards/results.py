"""Parses what rewards return: one finite number per response, or a failure."""

import inspect
import numbers
from collections.abc import Mapping, Sequence
from contextlib import suppress
from decimal import Decimal
from typing import Any

from rlhf_pl.rewards.base import MAX_NAME, Failure, Reward, RewardResult, Sample
from rlhf_pl.rewards.copies import copy_samples
from rlhf_pl.utils.errors import LARGEST_REWARD, InputError
from rlhf_pl.utils.terminal import summarize

Outcome = RewardResult | Failure
_TEXT = (str, bytes, bytearray, memoryview)
_MAX_TOKENS = 2**31 - 1  # the maximum of the store's column
_MAX_QUOTED = 200  # characters of an invalid value that an error quotes


class CallFailed(Exception):
    """A call of a reward failed as a whole."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.detail)
        self.failure = failure


def score_copies(reward: Reward, batch: Sequence[Sample]) -> list[Outcome]:
    """Score a batch: call a reward with copies of the samples, which it may change.

    Raises:
        CallFailed: It did not return one result per sample. Exceptions of the reward are not caught.
    """
    return parse_outcomes(reward.score(copy_samples(batch)), batch)


def parse_outcomes(values: Any, batch: Sequence[Sample]) -> list[Outcome]:
    """Parse a sequence or one-dimensional array of numbers, results or failures: one outcome per sample.

    Raises:
        CallFailed: It is neither, or its length differs from the batch's.
    """
    items = _to_list(values, len(batch))
    if len(items) != len(batch):
        raise CallFailed(
            Failure(
                "wrong_count",
                f"returned {len(items)} scores for {len(batch)} responses (prompt_id {batch[0].prompt_id!r} to "
                f"{batch[-1].prompt_id!r}); it must return one per response, in order.",
            )
        )
    return [_parse_item(item) for item in items]


def _to_list(values: Any, count: int) -> list[Any]:
    shape = getattr(values, "shape", None)
    if isinstance(values, _TEXT) or not isinstance(shape, tuple):
        if isinstance(values, Sequence) and not isinstance(values, _TEXT):
            return list(values)
        raise _make_wrong_type(quote_value(values), count)
    if len(shape) == 2 and shape[1] == 1 and hasattr(values, "reshape"):  # the shape of a reward model's output
        values = values.reshape(-1)
    if len(values.shape) == 1:
        return _array_to_list(values)
    raise _make_wrong_type(f"an array of shape {tuple(shape)}", count)


def _array_to_list(values: Any) -> list[Any]:
    """The elements of an array, series or tensor of numbers. Dates are rejected rather than converted to numbers."""
    kind = getattr(getattr(values, "dtype", None), "kind", "O")
    if kind not in "biufO":
        raise CallFailed(Failure("wrong_type", f"returned an array of {values.dtype}; it must hold numbers.", True))
    elements = values.tolist() if hasattr(values, "tolist") else list(values)
    return list(elements)


def _make_wrong_type(what: str, count: int) -> CallFailed:
    return CallFailed(
        Failure(
            "wrong_type",
            f"returned {what}; a reward that takes a batch must return a list of {count} numbers (or a tuple, an array "
            "or a tensor with one dimension), one per response, in order.",
            final=True,
        )
    )


def _parse_item(result: Any) -> Outcome:
    """A result with plain floats; a number is a reward without components."""
    if isinstance(result, Failure):
        return result
    if getattr(result, "reward", result) is None:
        # a reward says so that it has none, and would again
        return Failure("refused", "returned None, which is no score.", final=True)
    try:
        reward = to_float(getattr(result, "reward", result), "")
        components = _parse_components(getattr(result, "components", {}))
        truncated = _parse_count(getattr(result, "truncated_tokens", 0))
    except CallFailed as failed:
        return failed.failure
    for name, value in (("", reward), *components.items()):
        if not abs(value) <= LARGEST_REWARD:
            which = f" as component `{name}`" if name else ""
            rule = f"Every score must be a finite number with an absolute value of at most {LARGEST_REWARD:g}."
            return Failure("not_finite", f"returned {value}{which}. {rule}")
    return RewardResult(reward, components, truncated)


def _parse_components(value: Any) -> dict[str, float]:
    if not isinstance(value, Mapping):
        detail = f"returned {quote_value(value)} as components; it must be a mapping of names to numbers."
        raise CallFailed(Failure("exception", detail))
    named = {summarize(replace_surrogates(str(name)), MAX_NAME): part for name, part in value.items()}
    return {name: to_float(part, name) for name, part in named.items()}


def _parse_count(value: Any) -> int:
    if isinstance(value, numbers.Integral) and 0 <= int(value) <= _MAX_TOKENS:
        return int(value)
    raise CallFailed(Failure("exception", f"returned {quote_value(value)} as truncated_tokens; it must be a count."))


def to_float(value: Any, component: str) -> float:
    """Convert a number to a float: of Python or numpy, a Decimal, a Fraction, or an array or tensor with one element.

    Raises:
        CallFailed: It is not a number, or too large for a float.
    """
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and all(length == 1 for length in shape) and hasattr(value, "item"):
        value = value.item()
    which = f" as component `{component}`" if component else ""
    if not isinstance(value, numbers.Real | Decimal):
        close = getattr(value, "close", None)
        if inspect.iscoroutine(value) and callable(close):
            close()
        advice = " Await it, for example with asyncio.run()." if inspect.isawaitable(value) else ""
        kind = type(value).__name__
        detail = f"returned {quote_value(value)} ({kind}){which}, which is not a number.{advice}"
        raise CallFailed(Failure("exception", detail))
    try:
        return float(value)
    except (OverflowError, ValueError, TypeError, ArithmeticError) as error:
        kind = "not_finite" if isinstance(error, OverflowError) else "exception"
        detail = f"returned {quote_value(value)}{which}, which can't be converted to a floating-point number ({error})."
        raise CallFailed(Failure(kind, detail)) from error


def make_failure(error: BaseException) -> Failure:
    """The failure of a call that raised `error`."""
    if isinstance(error, CallFailed):
        return error.failure
    if isinstance(error, InputError):
        return Failure("exception", str(error))
    kind, text = type(error).__name__, _error_text(error)
    if isinstance(error, Exception):
        return Failure("exception", f"{kind}: {text}.")
    advice = "Raise an `Exception` instead, and don't call functions that end the process, such as sys.exit()."
    return Failure("exception", f"raised {kind}({text}), which is meant to end the run. {advice}", final=True)


def _error_text(error: BaseException) -> str:
    try:
        return replace_surrogates(str(error))
    except Exception:  # users' classes may fail at anything
        return "(its text is not available)"


def quote_value(value: Any) -> str:
    """A value's text for an error, truncated to a line; its type if it has no text."""
    text = f"a {type(value).__name__}"
    with suppress(Exception):  # users' classes may fail at anything, and long integers have no text
        text = replace_surrogates(repr(value))
    return truncate_text(text, _MAX_QUOTED)


def truncate_text(text: str, limit: int) -> str:
    """Truncate a text to at most `limit` characters."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def replace_surrogates(text: str) -> str:
    """Replace lone surrogates, which can't be encoded."""
    return text.encode("utf-8", "replace").decode()
