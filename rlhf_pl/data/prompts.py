"""Prompt rows: read from files or the Hub, checked one by one, split, and cut to the length limit."""

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_pl.chat import Message, encode_prompt, message_problem, with_system_prompt
from rlhf_pl.data.files import Row, check_columns, parse_rows
from rlhf_pl.errors import InputError


@dataclass(frozen=True)
class Prompt:
    """One row of prompt data.

    Args:
        prompt_id: Unique name of the row.
        messages: The conversation that the policy answers, system prompt included.
        columns: The row's other columns; every row has the same ones.
        token_ids: The conversation by the policy's chat template; empty until `tokenize_prompts`.
    """

    prompt_id: str
    messages: list[Message]
    columns: Mapping[str, Any] = field(default_factory=dict)
    token_ids: tuple[int, ...] = ()


def load_prompts(
    source: str, columns: Mapping[str, str] | None = None, system_prompt: str | None = None, split: str = "train"
) -> list[Prompt]:
    """All prompts of a file or a Hub data set.

    A row has `prompt` (text, or a list of chat messages) or `messages` (a conversation; an answer at its end is left
    out), and may have `prompt_id`. Other columns go to the reward. Rows without `prompt_id` are named by their number.

    Args:
        source: A .jsonl, .json, .csv or .parquet file, or a Hub id.
        columns: What the data calls our columns, such as `{"prompt": "question", "prompt_id": "id"}`.
        system_prompt: Put in front of conversations that have none.
        split: Split of a Hub data set.

    Raises:
        InputError: The source can't be read, or rows are wrong: up to 10 are listed.
    """
    names = check_columns(columns, ("prompt", "messages", "prompt_id"))
    seen: dict[str, str] = {}
    others: dict[str, None] = {}  # an ordered set

    def parse(where: str, number: int, row: Row) -> Prompt:
        prompt = _parse_row(row, number, names, system_prompt)
        if prompt.prompt_id in seen:
            found = f"{prompt.prompt_id!r}, which is also that of {seen[prompt.prompt_id]}"
            raise InputError(f"`{names.get('prompt_id', 'prompt_id')}` is {found}; expected one of its own")
        seen[prompt.prompt_id] = where
        others.update(dict.fromkeys(prompt.columns))
        return prompt

    prompts = parse_rows(source, split, "data.prompts", parse)
    return [Prompt(p.prompt_id, p.messages, {name: p.columns.get(name) for name in others}) for p in prompts]


def count_duplicates(prompts: Sequence[Prompt]) -> int:
    """Prompts whose conversation an earlier one has too, under another id."""
    return len(prompts) - len({json.dumps(p.messages, sort_keys=True) for p in prompts})


def _parse_row(row: Row, number: int, columns: Mapping[str, str], system_prompt: str | None) -> Prompt:
    key = next((k for k in ("prompt", "messages") if columns.get(k, k) in row), None)
    if key is None:
        wanted = " or ".join(f"`{columns.get(k, k)}`" for k in ("prompt", "messages"))
        raise InputError(
            f"no column {wanted}; found {', '.join(map(str, row)) or 'none'}. Name yours with --data.columns.prompt"
        )
    column = columns.get(key, key)
    value = row[column]
    if isinstance(value, str):
        if not value.strip():
            raise InputError(f"`{column}` is empty; expected text or a list of messages")
        messages: Any = [{"role": "user", "content": value}]
    else:
        messages = list(value) if isinstance(value, Sequence) else value
        if key == "messages":
            while isinstance(messages, list) and messages and _is_assistant(messages[-1]):
                messages.pop()
    if problem := message_problem(messages):
        raise InputError(f"`{column}`: {problem}")
    id_column = columns.get("prompt_id", "prompt_id")
    prompt_id = row.get(id_column)
    if prompt_id is None:
        if "prompt_id" in columns and id_column not in row:
            raise InputError(f"no column `{id_column}`; found {', '.join(row)}")
        prompt_id = f"row-{number}"
    elif not isinstance(prompt_id, str | int) or isinstance(prompt_id, bool) or prompt_id == "":
        raise InputError(f"`{id_column}` is {prompt_id!r}; expected text or a whole number")
    messages = [{"role": m["role"], "content": m["content"]} for m in messages]
    rest = {str(k): v for k, v in row.items() if k not in (column, id_column)}
    return Prompt(str(prompt_id), with_system_prompt(messages, system_prompt), rest)


def _is_assistant(message: Any) -> bool:
    return isinstance(message, Mapping) and message.get("role") == "assistant"


def tokenize_prompts(prompts: Sequence[Prompt], tokenizer: Any, max_prompt_tokens: int) -> tuple[list[Prompt], int]:
    """The prompts with token ids that fit, and how many were too long."""
    kept = []
    for prompt in prompts:
        try:
            ids = encode_prompt(tokenizer, prompt.messages)
        except Exception as error:  # a template may refuse roles or their order, each in its own way
            raise InputError(
                f"`data.prompts`: the chat template refuses prompt_id {prompt.prompt_id!r} "
                f"(roles {[m['role'] for m in prompt.messages]}): {error}"
            ) from error
        if len(ids) <= max_prompt_tokens:
            kept.append(Prompt(prompt.prompt_id, prompt.messages, prompt.columns, tuple(ids)))
    return kept, len(prompts) - len(kept)


def split_held_out(prompts: Sequence[Prompt], count: int) -> tuple[list[Prompt], list[Prompt]]:
    """(training, held-out) prompts. The held-out ones follow from the ids alone, whatever the seed or row order."""
    ranked = sorted(prompts, key=lambda p: hashlib.sha256(p.prompt_id.encode()).digest())
    held_out = {p.prompt_id for p in ranked[:count]}
    return [p for p in prompts if p.prompt_id not in held_out], [p for p in prompts if p.prompt_id in held_out]


def prompts_of_round(prompts: Sequence[Prompt], round_index: int, per_round: int | None, seed: int) -> list[Prompt]:
    """The prompts of one round: a pure function of its arguments.

    The prompts are shuffled and cut into slices, a slice a round; when no whole slice is left they are shuffled anew.
    So no prompt comes twice in a round, and none again before (almost) all others.
    """
    size = len(prompts) if per_round is None else min(per_round, len(prompts))
    turn, slot = divmod(round_index, len(prompts) // size)
    order = list(range(len(prompts)))
    random.Random(f"{seed}:{turn}").shuffle(order)
    return [prompts[i] for i in order[slot * size : (slot + 1) * size]]
