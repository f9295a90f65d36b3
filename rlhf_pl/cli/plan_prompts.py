"""The prompts of a planned round: how many there are, and how long they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_pl.cli.plan_lengths import (
    CHARACTERS_PER_TOKEN,
    describe_picked,
    estimate_tokens,
    is_file,
    message_characters,
    pick_rows,
)
from rlhf_pl.data import RoundDataModule
from rlhf_pl.data.held_out import count_held_out, default_held_out
from rlhf_pl.data.prompts import Prompt
from rlhf_pl.models.chat import encode_prompt
from rlhf_pl.utils.errors import InputError


@dataclass(frozen=True)
class PlannedPrompts:
    """Prompts of a round.

    Args:
        count: Prompts of a round; 1,000 if `is_known` is false.
        is_known: Whether the data set could be counted, or the config sets the number.
        held_out: Held-out prompts.
        typical: Mean tokens of a prompt.
        longest: Tokens of the longest prompt that is kept.
        source: How the lengths were found, in words.
    """

    count: int
    is_known: bool
    held_out: int
    typical: float
    longest: int
    source: str


def plan_prompts(module: Any, data: RoundDataModule) -> PlannedPrompts:
    """Count the prompts of a round and measure their lengths, where they are in a file.

    Raises:
        InputError: The file can't be read, or all prompts are too long.
    """
    source, limit = data.prompts_source, data.max_prompt_tokens
    if not is_file(source):
        count, held_out = data.prompts_per_round, data.val_prompts_source
        known = default_held_out(10**6) if held_out is None else held_out
        return PlannedPrompts(
            count or 1000,
            count is not None,
            int(known) if isinstance(known, int | float) and (known >= 1 or known == 0) else default_held_out(10**6),
            limit / 2,
            limit,
            f"prompts are half of data.max_prompt_tokens, assumed: {source!r} is not a file on this machine",
        )
    rows = data.load_rows(source, "data.prompts")
    lengths, how = _lengths(module, rows, data.chat_template_kwargs)
    kept = [length for length in lengths.typical if length <= limit]
    if not kept:
        raise InputError(
            f"`data.prompts`: all prompts of {source!r} that were read are longer than max_prompt_tokens={limit}."
        )
    held_out = _held_out(data, len(rows))
    # the longest rows were looked for, so one above the limit means that others may be just below it
    longest = min(limit, max([*kept, *lengths.longest]))
    own = len(rows) - (0 if isinstance(data.val_prompts_source, str) else held_out)
    count = min(data.prompts_per_round or own, own)
    return PlannedPrompts(max(1, count), True, held_out, sum(kept) / len(kept), longest, how)


@dataclass(frozen=True)
class _Lengths:
    typical: list[int]
    longest: list[int]


def _lengths(module: Any, rows: Sequence[Prompt], kwargs: dict[str, Any]) -> tuple[_Lengths, str]:
    """Tokens of a sample of the rows, and of the longest ones by characters; how they were counted."""
    sample, longest = pick_rows(rows, _characters)
    try:
        tokenizer = module.source.tokenizer
    except InputError:  # a model on the Hub, which is not here
        counted = _Lengths(*([estimate_tokens(_characters(p)) for p in part] for part in (sample, longest)))
        return counted, f"prompts by {CHARACTERS_PER_TOKEN} characters a token, as the tokenizer is not here"
    encoded = ([len(encode_prompt(tokenizer, p.messages, p.tools, kwargs)) for p in part] for part in (sample, longest))
    some = describe_picked(len(sample) + len(longest), len(rows))
    return _Lengths(*encoded), f"prompts by the tokenizer{some}"


def _characters(prompt: Prompt) -> int:
    return message_characters(prompt.messages)


def _held_out(data: RoundDataModule, rows: int) -> int:
    held_out = data.val_prompts_source
    if held_out is None:
        return default_held_out(rows)
    if isinstance(held_out, str):
        return len(data.load_rows(held_out, "data.val_prompts")) if is_file(held_out) else default_held_out(10**6)
    return count_held_out(rows, held_out, least=1)
