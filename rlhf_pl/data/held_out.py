"""Which rows are held out."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from rlhf_pl.utils.errors import InputError

T = TypeVar("T")


def prompt_key(messages: Sequence[Mapping[str, Any]]) -> str:
    """What tells prompts apart for `hold_out`: roles and contents alone."""
    return repr([{"role": m["role"], "content": m.get("content")} for m in messages])


def check_held_out(option: str, wanted: float | str) -> None:
    """Raise InputError unless `wanted` is a share below 1, a whole number of rows, or a source of them."""
    if isinstance(wanted, str):
        return
    if not 0 <= wanted < math.inf or (wanted >= 1 and wanted != int(wanted)):
        raise InputError(f"`{option}` must be a share below 1 or a whole number, got {wanted}.")


def hold_out(
    rows: Sequence[T],
    wanted: float | str,
    option: str,
    load: Callable[[str, str], list[T]],
    key: Callable[[T], str],
    seed: int | None = None,
    least: int = 0,
) -> tuple[list[T], list[T]]:
    """(training rows, held-out rows), each in the order of `rows`; rows with the same key are on the same side.

    Args:
        rows: All rows of the source that trains.
        wanted: A share below 1 or a number of rows: whole groups are taken until it is reached. Or a source of its own.
        option: The option that gave `wanted`, for errors.
        load: (source, option) -> the rows of a source.
        key: Of a row. Which keys are held out does not depend on the order of the rows.
        seed: Another seed holds out other keys; None for the keys alone.
        least: The smallest number that a share stands for, rows.

    Raises:
        InputError: Nothing would be left to train on.
    """
    if isinstance(wanted, str):
        return list(rows), load(wanted, option)
    count = max(least, round(wanted * len(rows))) if 0 < wanted < 1 else int(wanted)
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
            f"`{option}` of {wanted} leaves none of {len(rows)} rows to train on: all {len(rows)} are held out."
        )
    return [row for i, row in enumerate(rows) if i not in val], [rows[i] for i in sorted(val)]
