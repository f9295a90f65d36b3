"""Which rows of a data set a plan measures, and whether the data set is on this machine."""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
SAMPLE, LONGEST = 400, 100  # rows that are tokenized of larger files: any, and the longest by characters
CHARACTERS_PER_TOKEN = 4
_FILES = (".jsonl", ".json", ".csv", ".parquet")


def is_file(source: str) -> bool:
    """Whether a source is, or is meant to be, a file of this machine; otherwise it is on the Hub."""
    return Path(source).exists() or Path(source).suffix in _FILES


def pick_rows(rows: Sequence[T], characters: Callable[[T], int]) -> tuple[list[T], list[T]]:
    """Rows to measure: a random sample, and the longest ones; all rows, and none, where they are few.

    Args:
        rows: All rows.
        characters: Returns the number of characters of a row.
    """
    if len(rows) <= SAMPLE + LONGEST:
        return list(rows), []
    return random.Random(0).sample(list(rows), SAMPLE), sorted(rows, key=characters)[-LONGEST:]


def describe_picked(count: int, rows: int) -> str:
    """How many of the rows were measured, if not all."""
    return "" if count == rows else f", {count} of {rows:,}"


def message_characters(messages: Iterable[Mapping[str, Any]]) -> int:
    """Characters of the contents of messages."""
    return sum(len(str(message.get("content") or "")) for message in messages)


def estimate_tokens(characters: int) -> int:
    """Tokens of a text of so many characters, where the tokenizer is not on this machine."""
    return characters // CHARACTERS_PER_TOKEN + 1
