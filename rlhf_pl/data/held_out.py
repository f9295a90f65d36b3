"""Splits rows into training rows and held-out rows."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from rlhf_pl.utils.errors import InputError

T = TypeVar("T")
_SHARE, _MOST = 5, 64  # by default: one of 5 rows, and no more than tell a gain from noise


def default_held_out(rows: int) -> int:
    """Number of rows that are held out by default: a fifth, at most 64, and none of fewer than 5."""
    return min(_MOST, rows // _SHARE)


def count_held_out(rows: int, held_out: float, least: int = 0) -> int:
    """Number of rows that a share below 1, of at least `least` rows, or a number of rows holds out."""
    return max(least, round(held_out * rows)) if 0 < held_out < 1 else int(held_out)


def prompt_key(messages: Sequence[Mapping[str, Any]]) -> str:
    """The key of a prompt for `hold_out`: the roles and contents of its messages only."""
    return repr([{"role": m["role"], "content": m.get("content")} for m in messages])


def check_held_out(option: str, held_out: float | str) -> None:
    """Raise InputError unless `held_out` is a share below 1, a whole number of rows, or a source of them."""
    if isinstance(held_out, str):
        return
    if not 0 <= held_out < math.inf or (held_out >= 1 and held_out != int(held_out)):
        raise InputError(f"`{option}` must be a share below 1 or a whole number, got {held_out}.")


def hold_out(
    rows: Sequence[T],
    held_out: float | str,
    option: str,
    load: Callable[[str, str], list[T]],
    key: Callable[[T], str],
    seed: int | None = None,
    least: int = 0,
) -> tuple[list[T], list[T]]:
    """Split rows into (training rows, held-out rows), each in the order of `rows`.

    Rows with the same key are on the same side. The choice depends on keys and seed, not on the order of the rows.

    Args:
        rows: All rows of the training source.
        held_out: A share below 1 or a number of rows: groups of rows with one key are held out until it is reached.
            Or a separate source, whose rows are all held out.
        option: The option that sets `held_out`, for errors.
        load: (source, option) -> the rows of a source.
        key: Returns the key of a row.
        seed: Selects which keys are held out. None uses an order that depends on the keys only.
        least: Minimum number of rows for a share above 0.

    Raises:
        InputError: No row would be left to train on.
    """
    if isinstance(held_out, str):
        return list(rows), load(held_out, option)
    count = count_held_out(len(rows), held_out, least)
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(key(row), []).append(i)
    salt = "" if seed is None else f"{seed}:"
    val: set[int] = set()
    for name in sorted(groups, key=lambda name: hashlib.sha256(f"{salt}{name}".encode()).digest()):
        if len(val) >= count:
            break
        val.update(groups[name])
    if len(val) == len(rows):
        raise InputError(
            f"`{option}` of {held_out} leaves none of {len(rows)} rows to train on: all {len(rows)} are held out."
        )
    return [row for i, row in enumerate(rows) if i not in val], [rows[i] for i in sorted(val)]
