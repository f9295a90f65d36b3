"""Rewards that can be checked by rule: answers, patterns, numbers, JSON, lengths. Each gives 0 to 1."""

import json
import math
import re
from abc import abstractmethod
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from rlhf_pl.rewards.base import Reward, RewardResult, Sample
from rlhf_pl.rewards.json_schema import schema_validator
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.unique_keys import loads

_NUMBER = re.compile(r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?(?:\s*/\s*\d+)?")
_MARKED = (
    re.compile(r"\\boxed\{([^{}]*)\}"),
    re.compile(r"####\s*([^\n]+)"),
    re.compile(r"answer\s*(?:is|:|=)\s*([^\n]+)", re.IGNORECASE),
)


class RuleReward(Reward):
    """A reward that looks at one answer at a time. Subclass it and write `one`."""

    @abstractmethod
    def one(self, sample: Sample) -> float:
        """The reward of an answer."""

    def score(self, batch: Sequence[Sample]) -> list[RewardResult]:
        return [RewardResult(self.one(sample)) for sample in batch]

    @property
    def trial(self) -> bool:
        return True

    @property
    def one_by_one(self) -> bool:
        return True  # a pattern can take very long on one answer


def column_of(sample: Sample, name: str, reward: str) -> Any:
    """A column of the prompt's row.

    Raises:
        InputError: It is not there, or empty.
    """
    value = sample.columns.get(name)
    if value is None or value == "":
        found = ", ".join(sample.columns) or "none"
        raise InputError(
            f"{reward} needs the column `{name}`, which prompt_id {sample.prompt_id!r} has not. Columns: {found}."
        )
    return value


class ExactAnswer(RuleReward):
    """1 if the answer equals the row's answer key, else 0. White space at the ends and runs of it do not count.

    Args:
        column: Column with the key: text, or a list of texts of which any will do.
        pattern: A regular expression whose first group (or whole match) is the answer inside the response, the last
            match counts; null for the whole response.
        ignore_case: Compare without regard to case.
    """

    def __init__(self, column: str = "answer", pattern: str | None = None, ignore_case: bool = True) -> None:
        self.column, self.pattern, self.ignore_case = column, pattern, ignore_case
        self._pattern = None if pattern is None else _compile(pattern, ignore_case)

    def one(self, sample: Sample) -> float:
        keys = column_of(sample, self.column, "ExactAnswer")
        given = sample.response
        if self._pattern is not None:
            found = list(self._pattern.finditer(given))
            if not found:
                return 0.0
            given = found[-1][1] if found[-1].re.groups else found[-1][0]
            given = given or ""
        accepted = keys if isinstance(keys, list | tuple) else [keys]
        return float(any(self._plain(given) == self._plain(str(key)) for key in accepted))

    def _plain(self, text: str) -> str:
        text = " ".join(text.split())
        return text.casefold() if self.ignore_case else text


class RegexMatch(RuleReward):
    """1 if a regular expression matches somewhere in the answer, else 0.

    Args:
        pattern: The expression; `(?s)` at its start lets a dot match line ends, `^` and `$` bind it to the ends.
        column: Take the expression from this column of the row instead.
        ignore_case: Match without regard to case.
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
            pattern = _compile(str(column_of(sample, self.column, "RegexMatch")), self.ignore_case)
        return float(pattern.search(sample.response) is not None)


def _compile(pattern: str, ignore_case: bool) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.IGNORECASE if ignore_case else 0)
    except re.error as error:
        raise InputError(f"`rollout.reward.pattern`: {pattern!r} is no regular expression: {error}.") from error


class NumericAnswer(RuleReward):
    """1 if the number that the answer ends up with is the row's, else 0.

    That number is the last one in `\\boxed{}`, after `####`, or after "answer is"; without such a mark the last one of
    all. Thousands separators, signs, exponents, fractions and a percent sign (42% is 42) are understood.

    Args:
        column: Column with the key: a number, or text that ends up with one in the same way.
        tolerance: Largest difference, relative to the key where that is above 1.
    """

    def __init__(self, column: str = "answer", tolerance: float = 1e-6) -> None:
        if tolerance < 0:
            raise InputError(f"`rollout.reward.tolerance` must be 0 or more, got {tolerance}.")
        self.column, self.tolerance = column, tolerance

    def one(self, sample: Sample) -> float:
        key = column_of(sample, self.column, "NumericAnswer")
        expected = float(key) if isinstance(key, int | float) else final_number(str(key))
        if expected is None or not math.isfinite(expected):
            raise InputError(f"NumericAnswer: the column `{self.column}` of prompt_id {sample.prompt_id!r} is {key!r}, "
                             "which holds no number.")  # fmt: skip
        given = final_number(sample.response)
        return float(given is not None and abs(given - expected) <= self.tolerance * max(1.0, abs(expected)))


def final_number(text: str) -> float | None:
    """The number that a text ends up with, or None."""
    for mark in _MARKED:
        for marked in reversed(mark.findall(text)):
            if numbers := _numbers(marked):
                return numbers[-1] if mark is _MARKED[0] else numbers[0]
    numbers = _numbers(text)
    return numbers[-1] if numbers else None


def _numbers(text: str) -> list[float]:
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
    """1 if the answer is JSON that a JSON Schema accepts, else 0. JSON in a Markdown code block counts too.

    A `$ref` must lead to a place in the schema itself, or to the JSON Schema drafts: nothing is fetched or opened.

    Args:
        schema: The schema, or a .json file with it.
        column: Take the schema from this column of the row instead.
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
        self._validator = None if schema is None else schema_validator(schema)

    def one(self, sample: Sample) -> float:
        validator = self._validator
        if validator is None:
            assert self.column is not None
            schema = column_of(sample, self.column, "JSONSchema")
            validator = schema_validator(json.loads(schema) if isinstance(schema, str) else schema)
        text = sample.response.strip()
        fenced = re.fullmatch(r"(?s)```(?:json)?\s*\n(.*?)\n?```", text)
        try:
            value = json.loads(fenced[1] if fenced else text)
        except (ValueError, RecursionError):
            return 0.0
        return float(validator.is_valid(value))


class LengthWindow(RuleReward):
    """1 for answers whose length is in a window, falling to 0 over `falloff` on both sides of it.

    Args:
        shortest: Least length that gets 1.
        longest: Greatest length that gets 1.
        unit: What is counted: `tokens` of the policy (words where an answer brings no tokens), `words`, `characters`.
        falloff: Distance from the window, in the same unit, at which the reward reaches 0; 0 for a sharp edge.
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
        outside = max(self.shortest - length, length - self.longest, 0)
        return 1.0 if outside == 0 else max(0.0, 1 - outside / self.falloff) if self.falloff else 0.0
