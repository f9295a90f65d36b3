"""Rewards by rule: answer keys, patterns, numbers, JSON, lengths. Each is from 0 to 1."""

import json
import math
import re
from abc import abstractmethod
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from rlhf_pl.rewards.base import Reward, RewardResult, Sample
from rlhf_pl.rewards.json_schema import make_schema_validator
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.unique_keys import loads

_NUMBER = re.compile(r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?(?:\s*/\s*\d+)?")
_MARKED = (
    re.compile(r"\\boxed\{([^{}]*)\}"),
    re.compile(r"####\s*([^\n]+)"),
    re.compile(r"answer\s*(?:is|:|=)\s*([^\n]+)", re.IGNORECASE),
)


class RuleReward(Reward):
    """A reward that scores one response at a time. A subclass implements `one`."""

    @abstractmethod
    def one(self, sample: Sample) -> float:
        """Score a response."""

    def score(self, batch: Sequence[Sample]) -> list[RewardResult]:
        return [RewardResult(self.one(sample)) for sample in batch]

    @property
    def trial(self) -> bool:
        return True

    @property
    def one_by_one(self) -> bool:
        return True  # a pattern can take very long on one response


def get_column(sample: Sample, name: str, reward: str) -> Any:
    """The value of a column of the prompt's row.

    Raises:
        InputError: The row has no such column, or it is empty.
    """
    value = sample.columns.get(name)
    if value is None or value == "":
        columns = ", ".join(sample.columns) or "none"
        raise InputError(
            f"{reward} needs the column `{name}`, which prompt_id {sample.prompt_id!r} does not have. Columns: "
            f"{columns}."
        )
    return value


class ExactAnswer(RuleReward):
    """1 if the response equals the row's answer key, else 0. Differences in white space are ignored.

    Args:
        column: Column with the key: a text, or a list of accepted texts.
        pattern: A regular expression whose first group (or whole match) is the answer within the response. The last
            match is used. null for the whole response.
        ignore_case: Whether case is ignored.
    """

    def __init__(self, column: str = "answer", pattern: str | None = None, ignore_case: bool = True) -> None:
        self.column, self.pattern, self.ignore_case = column, pattern, ignore_case
        self._pattern = None if pattern is None else _compile(pattern, ignore_case)

    def one(self, sample: Sample) -> float:
        keys = get_column(sample, self.column, "ExactAnswer")
        answer = sample.response
        if self._pattern is not None:
            matches = list(self._pattern.finditer(answer))
            if not matches:
                return 0.0
            answer = matches[-1][1] if matches[-1].re.groups else matches[-1][0]
            answer = answer or ""
        accepted = keys if isinstance(keys, list | tuple) else [keys]
        return float(any(self._normalize(answer) == self._normalize(str(key)) for key in accepted))

    def _normalize(self, text: str) -> str:
        text = " ".join(text.split())
        return text.casefold() if self.ignore_case else text


class RegexMatch(RuleReward):
    """1 if a regular expression matches anywhere in the response, else 0.

    Args:
        pattern: The expression. With `(?s)` at its start a dot also matches line ends; `^` and `$` anchor it.
        column: Column with the expression, instead of `pattern`.
        ignore_case: Whether case is ignored.
    """

    def __init__(self, pattern: str | None = None, column: str | None = None, ignore_case: bool = False) -> None:
        if (pattern is None) == (column is None):
            raise InputError("`rollout.reward`: RegexMatch takes either `pattern` or `column`.")
        self.pattern, self.column, self.ignore_case = pattern, column, ignore_case
        self._pattern = None if pattern is None else _compile(pattern, ignore_case)

    def one(self, sample: Sample) -> float:
        pattern = self._pattern
        if pattern is None:
            assert self.column is not None
            pattern = _compile(str(get_column(sample, self.column, "RegexMatch")), self.ignore_case)
        return float(pattern.search(sample.response) is not None)


def _compile(pattern: str, ignore_case: bool) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.IGNORECASE if ignore_case else 0)
    except re.error as error:
        raise InputError(f"`rollout.reward.pattern`: {pattern!r} is not a regular expression: {error}.") from error


class NumericAnswer(RuleReward):
    """1 if the final number of the response equals the row's, else 0.

    The final number is the last one in `\\boxed{}`, after `####`, or after "answer is"; without such a mark, the last
    one in the text. Thousands separators, signs, exponents, fractions and percent signs (42% is 42) are supported.

    Args:
        column: Column with the key: a number, or a text whose final number is found in the same way.
        tolerance: Maximum difference; relative to the key if the key is above 1.
    """

    def __init__(self, column: str = "answer", tolerance: float = 1e-6) -> None:
        if tolerance < 0:
            raise InputError(f"`rollout.reward.tolerance` must be 0 or more, got {tolerance}.")
        self.column, self.tolerance = column, tolerance

    def one(self, sample: Sample) -> float:
        key = get_column(sample, self.column, "NumericAnswer")
        expected = float(key) if isinstance(key, int | float) else find_final_number(str(key))
        if expected is None or not math.isfinite(expected):
            raise InputError(
                f"NumericAnswer: the column `{self.column}` of prompt_id {sample.prompt_id!r} is {key!r}, which "
                "contains no number."
            )
        number = find_final_number(sample.response)
        return float(number is not None and abs(number - expected) <= self.tolerance * max(1.0, abs(expected)))


def find_final_number(text: str) -> float | None:
    """The final number of a text (`NumericAnswer`); None if it has none."""
    for mark in _MARKED:
        for marked in reversed(mark.findall(text)):
            if numbers := _find_numbers(marked):
                return numbers[-1] if mark is _MARKED[0] else numbers[0]
    numbers = _find_numbers(text)
    return numbers[-1] if numbers else None


def _find_numbers(text: str) -> list[float]:
    found = []
    for match in _NUMBER.finditer(text):
        number = match[0]
        # a hyphen right after a word or digit joins or subtracts: "covid-19", "3-2"
        if number[0] in "+-" and match.start() > 0 and text[match.start() - 1].isalnum():
            number = number[1:]
        try:
            top, _, bottom = number.replace(",", "").replace(" ", "").partition("/")
            value = float(Fraction(top) / Fraction(bottom)) if bottom else float(top)
        except (ZeroDivisionError, ValueError, OverflowError):
            continue
        if math.isfinite(value):
            found.append(value)
    return found


class JSONSchema(RuleReward):
    """1 if the response is JSON that is valid under a JSON Schema, else 0. It may be in a Markdown code block.

    A `$ref` must refer to the schema itself or to the JSON Schema drafts: nothing is fetched or opened.

    Args:
        schema: The schema, or a .json file with it.
        column: Column with the schema, instead of `schema`.
    """

    def __init__(self, schema: dict[str, Any] | str | None = None, column: str | None = None) -> None:
        if (schema is None) == (column is None):
            raise InputError("`rollout.reward`: JSONSchema takes either `schema` or `column`.")
        if isinstance(schema, str):
            try:
                schema = loads(Path(schema).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise InputError(f"`rollout.reward.schema`: cannot read {schema!r}: {error}.") from error
        self.schema, self.column = schema, column
        self._validator = None if schema is None else make_schema_validator(schema)

    def one(self, sample: Sample) -> float:
        validator = self._validator
        if validator is None:
            assert self.column is not None
            schema = get_column(sample, self.column, "JSONSchema")
            validator = make_schema_validator(json.loads(schema) if isinstance(schema, str) else schema)
        text = sample.response.strip()
        fenced = re.fullmatch(r"(?s)```(?:json)?\s*\n(.*?)\n?```", text)
        try:
            value = json.loads(fenced[1] if fenced else text)
        except (ValueError, RecursionError):
            return 0.0
        return float(validator.is_valid(value))


class LengthWindow(RuleReward):
    """1 for responses whose length is in a window, with a linear decrease to 0 over `falloff` on both sides.

    Args:
        shortest: Minimum length with reward 1.
        longest: Maximum length with reward 1.
        unit: Unit of length: `tokens` of the policy (words for responses without tokens), `words`, `characters`.
        falloff: Distance from the window at which the reward is 0, in the same unit; 0 for a sharp edge.
    """

    def __init__(
        self,
        shortest: int = 0,
        longest: int = 100,
        unit: Literal["tokens", "words", "characters"] = "words",
        falloff: int = 0,
    ) -> None:
        if not 0 <= shortest <= longest:
            raise InputError(
                f"`rollout.reward`: LengthWindow needs 0 <= shortest <= longest, got {shortest} and {longest}."
            )
        if falloff < 0:
            raise InputError(f"`rollout.reward.falloff` must be 0 or more, got {falloff}.")
        self.shortest, self.longest, self.unit, self.falloff = shortest, longest, unit, falloff

    def one(self, sample: Sample) -> float:
        if self.unit == "characters":
            length = len(sample.response)
        elif self.unit == "tokens" and len(sample.response_tokens):
            length = len(sample.response_tokens)
        else:
            length = len(sample.response.split())
        distance = max(self.shortest - length, length - self.longest, 0)
        return 1.0 if distance == 0 else max(0.0, 1 - distance / self.falloff) if self.falloff else 0.0
