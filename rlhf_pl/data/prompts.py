"""Reads, checks and tokenizes prompts, and selects those of each round."""

import json
import random
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rlhf_pl.data.files import Row, check_columns, parse_rows
from rlhf_pl.data.message_reader import MessageReader
from rlhf_pl.data.tokenizing import Recipe, iterate_token_lists, make_token_table
from rlhf_pl.models.chat import Message, Tools, encode_prompt, with_system_prompt
from rlhf_pl.utils.errors import InputError

COLUMNS = ("prompt", "messages", "prompt_id", "tools")


@dataclass(frozen=True)
class Prompt:
    """One row of prompt data.

    Args:
        prompt_id: Unique id of the row.
        messages: The conversation that the policy responds to, system prompt included.
        columns: The row's other columns; all rows have the same.
        token_ids: Token ids under the policy's chat template, 4 bytes per token; empty before `tokenize_prompts`.
        tools: The `tools` of the chat template.
        chat_template_kwargs: Further variables of the chat template.
    """

    prompt_id: str
    messages: list[Message]
    columns: Mapping[str, Any] = field(default_factory=dict)
    token_ids: Sequence[int] = ()
    tools: Tools | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the prompt in errors."""
        return f"prompt_id {self.prompt_id!r}"


def load_prompts(
    source: str,
    columns: Mapping[str, str] | None = None,
    system_prompt: str | None = None,
    split: str = "train",
    parse_dialogues: bool = True,
    option: str = "data.prompts",
) -> list[Prompt]:
    """Load all prompts of a file or a Hub data set.

    A row has `prompt` (text, or a list of chat messages) or `messages` (a conversation), and may have `prompt_id` and
    `tools`. A response at the end of a conversation is dropped. Other columns are passed to the reward. The id of a row
    without `prompt_id` is made of its index.

    Args:
        source: A .jsonl, .json, .csv or .parquet file, or a Hub id.
        columns: Our column names mapped to those of the data, e.g. `{"prompt": "question", "prompt_id": "id"}`.
        system_prompt: Prepended to conversations without a system prompt.
        split: Split of a Hub data set.
        parse_dialogues: Whether text that begins with `\\n\\nHuman:` and ends with `\\n\\nAssistant:` becomes messages.
        option: The option that names the source, for errors.

    Raises:
        InputError: The source can't be read, or rows are invalid: up to 10 are listed.
    """
    names = check_columns(columns, COLUMNS)
    reader = MessageReader(parse_dialogues)
    seen: dict[str, str] = {}
    others: dict[str, None] = {}  # an ordered set

    def parse(where: str, number: int, row: Row) -> Prompt:
        prompt = _parse_row(row, number, names, system_prompt, reader)
        if prompt.prompt_id in seen:
            found = f"{prompt.prompt_id!r}, as in {seen[prompt.prompt_id]}"
            raise InputError(f"`{names.get('prompt_id', 'prompt_id')}` is {found}; expected a unique id")
        seen[prompt.prompt_id] = where
        others.update(dict.fromkeys(prompt.columns))
        return prompt

    prompts = parse_rows(source, split, option, parse)
    reader.report(option)
    return [replace(p, columns={name: p.columns.get(name) for name in others}) for p in prompts]


def count_duplicates(prompts: Sequence[Prompt]) -> int:
    """Number of prompts with the conversation and tools of an earlier prompt."""
    return len(prompts) - len({json.dumps([p.messages, p.tools], sort_keys=True, default=str) for p in prompts})


def _parse_row(
    row: Row, number: int, columns: Mapping[str, str], system_prompt: str | None, reader: MessageReader
) -> Prompt:
    present = [k for k in ("prompt", "messages") if columns.get(k, k) in row]
    # tables merged from several sources have both columns, with None in one
    key = next((k for k in present if row[columns.get(k, k)] is not None), present[0] if present else None)
    if key is None:
        required = " or ".join(f"`{columns.get(k, k)}`" for k in ("prompt", "messages"))
        raise InputError(
            f"no column {required}; found {', '.join(map(str, row)) or 'none'}. Name yours with --data.columns.prompt"
        )
    column = columns.get(key, key)
    messages = reader.drop_response(reader.read_prompt(row, column, may_have_response=key == "messages"), column)
    id_column = columns.get("prompt_id", "prompt_id")
    prompt_id = row.get(id_column)
    if prompt_id is None:
        if "prompt_id" in columns and id_column not in row:
            raise InputError(f"no column `{id_column}`; found {', '.join(row)}")
        prompt_id = f"row-{number}"
    elif not isinstance(prompt_id, str | int) or isinstance(prompt_id, bool) or prompt_id == "":
        raise InputError(f"`{id_column}` is {prompt_id!r}; expected text or a whole number")
    tools_column = columns.get("tools", "tools")
    tools = reader.read_tools(row, tools_column)
    rest = {str(k): v for k, v in row.items() if k not in (column, id_column)}
    if tools_column in rest:
        rest[tools_column] = tools
    return Prompt(str(prompt_id), with_system_prompt(messages, system_prompt), rest, tools=tools)


def tokenize_prompts(
    prompts: Sequence[Prompt],
    tokenizer: Any,
    max_prompt_tokens: int,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    option: str = "data.prompts",
) -> tuple[list[Prompt], int]:
    """(tokenized prompts of at most `max_prompt_tokens` tokens, number of longer prompts).

    Raises:
        InputError: The chat template can't render some prompts: up to 10 are listed.
    """
    kwargs = dict(chat_template_kwargs or {})
    table = make_token_table(
        prompts,
        lambda prompt: [encode_prompt(tokenizer, prompt.messages, prompt.tools, kwargs)],
        ["ids"],
        Recipe(tokenizer, {"prompt": kwargs}, option),
        lambda prompt: [prompt.messages, prompt.tools],
    )
    kept = [
        replace(prompt, token_ids=array("i", ids.tobytes()), chat_template_kwargs=kwargs)
        for prompt, ids in zip(prompts, iterate_token_lists(table, "ids"), strict=True)
        if len(ids) <= max_prompt_tokens
    ]
    return kept, len(prompts) - len(kept)


def select_prompts(prompts: Sequence[Prompt], round_index: int, per_round: int | None, seed: int) -> list[Prompt]:
    """Select the prompts of one round: a pure function of its arguments.

    The prompts are shuffled and divided into slices, one per round. When no full slice is left, they are shuffled
    again. So a round has no prompt twice, and (almost) all prompts are used before one is repeated.
    """
    size = len(prompts) if per_round is None else min(per_round, len(prompts))
    return take_prompts(prompts, slice_start(round_index, size, len(prompts)), size, seed)[0]


def slice_start(round_index: int, size: int, total: int) -> int:
    """Position, in the order of `take_prompts`, of the slice of a round with `size` of `total` prompts."""
    cycle, part = divmod(round_index, total // size)
    return cycle * total + part * size


def take_prompts(prompts: Sequence[Prompt], start: int, count: int, seed: int) -> tuple[list[Prompt], int]:
    """Take prompts from the endless order of a run: all prompts shuffled, then all shuffled again, and so on.

    Args:
        prompts: All training prompts.
        start: Position of the first prompt to take.
        count: Number of prompts to take; all prompts if there are fewer.
        seed: Seed of the order.

    Returns:
        (the next `count` prompts, none of them twice; position after the last one).
    """
    taken: dict[int, None] = {}  # an ordered set
    order: list[int] = []
    position = start
    while len(taken) < min(count, len(prompts)):
        cycle, part = divmod(position, len(prompts))
        if part == 0 or not order:
            order = list(range(len(prompts)))
            random.Random(f"{seed}:{cycle}").shuffle(order)
        taken[order[part]] = None
        position += 1
    return [prompts[i] for i in taken], position
