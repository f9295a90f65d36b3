"""Which rows are held out."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_pl.utils.errors import InputError


def prompt_key(messages: Sequence[Mapping[str, Any]]) -> str:
    """What tells prompts apart for `split_groups`: roles and contents alone."""
    return repr([{"role": m["role"], "content": m.get("content")} for m in messages])


def split_groups(keys: Sequence[str], held_out: float, seed: int, option: str) -> tuple[list[int], list[int]]:
    """(training rows, held-out rows), by their numbers; rows with the same key are on the same side.

    Args:
        keys: One per row.
        held_out: A share below 1 or a number of rows; whole groups are taken until it is reached.
        seed: Another seed holds out others; the order of the rows does not matter.
        option: The option that gave `held_out`, for errors.

    Raises:
        InputError: `held_out` is no share or number, or nothing would be left to train on.
    """
    if not 0 <= held_out < math.inf or (held_out >= 1 and held_out != int(held_out)):
        raise InputError(f"`{option}` must be a share below 1 or a whole number, got {held_out}.")
    wanted = round(held_out * len(keys)) if held_out < 1 else int(held_out)
    groups: dict[str, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    ranked = sorted(groups, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())
    val: set[int] = set()
    for key in ranked:
        if len(val) >= wanted:
            break
        val.update(groups[key])
    if len(val) == len(keys):
        raise InputError(f"`{option}` of {held_out} leaves none of {len(keys)} rows to train on.")
    return [i for i in range(len(keys)) if i not in val], sorted(val)
