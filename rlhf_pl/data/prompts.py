"""Prompt rows: read from files or the Hub, checked one by one, split, and cut to the length limit."""

import json
import random
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rlhf_pl.data.files import Row, check_columns, parse_rows
from rlhf_pl.data.message_reader import MessageReader
from rlhf_pl.data.tokenizing import Recipe, token_lists, token_table
from rlhf_pl.models.chat import Message, Tools, encode_prompt, with_system_prompt
from rlhf_pl.utils.errors import InputError

COLUMNS = ("prompt", "messages", "prompt_id", "tools")


@dataclass(frozen=True)
class Prompt:
    """One row of prompt data.

    Args:
        prompt_id: Unique name of the row.
        messages: The conversation that the policy answers, system prompt included.
        columns: The row's other columns; every row has the same ones.
        token_ids: The conversation by the policy's chat template, 4 bytes a token; empty until `tokenize_prompts`.
        tools: What the chat template is given as `tools`.
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
        """What errors call it."""
        return f"prompt_id {self.prompt_id!r}"


def load_prompts(
    source: str,
    columns: Mapping[str, str] | None = None,
    system_prompt: str | None = None,
    split: str = "train",
    parse_dialogues: bool = True,
    option: str = "data.prompts",
) -> list[Prompt]:
    """All prompts of a file or a Hub data set.

    A row has `prompt` (text, or a list of chat messages) or `messages` (a conversation), and may have `prompt_id` and
    `tools`. A response at the end of a conversation is left out. Other columns go to the reward. Rows without
    `prompt_id` are named by their number.

    Args:
        source: A .jsonl, .json, .csv or .parquet file, or a Hub id.
        columns: What the data calls our columns, such as `{"prompt": "question", "prompt_id": "id"}`.
        system_prompt: Put in front of conversations that have none.
        split: Split of a Hub data set.
        parse_dialogues: Whether text that begins with `\\n\\nHuman:` and ends with `\\n\\nAssistant:` becomes messages.
        option: The option that names the source, for errors.

    Raises:
        InputError: The source can't be read, or rows are wrong: up to 10 are listed.
    """
    names = check_columns(columns, COLUMNS)
    reader = MessageReader(parse_dialogues)
    seen: dict[str, str] = {}
    others: dict[str, None] = {}  # an ordered set

    def parse(where: str, number: int, row: Row) -> Prompt:
        prompt = _parse_row(row, number, names, system_prompt, reader)
        if prompt.prompt_id in seen:
            found = f"{prompt.prompt_id!r}, which is also that of {seen[prompt.prompt_id]}"
            raise InputError(f"`{names.get('prompt_id', 'prompt_id')}` is {found}; expected one of its own")
        seen[prompt.prompt_id] = where
        others.update(dict.fromkeys(prompt.columns))
        return prompt

    prompts = parse_rows(source, split, option, parse)
    reader.report(option)
    return [replace(p, columns={name: p.columns.get(name) for name in others}) for p in prompts]


def count_duplicates(prompts: Sequence[Prompt]) -> int:
    """Prompts whose conversation an earlier one has too, under another id."""
    return len(prompts) - len({json.dumps([p.messages, p.tools], sort_keys=True, default=str) for p in prompts})


def _parse_row(
    row: Row, number: int, columns: Mapping[str, str], system_prompt: str | None, reader: MessageReader
) -> Prompt:
    there = [k for k in ("prompt", "messages") if columns.get(k, k) in row]
    # tables of several sources have both columns, and None in one
    key = next((k for k in there if row[columns.get(k, k)] is not None), there[0] if there else None)
    if key is None:
        wanted = " or ".join(f"`{columns.get(k, k)}`" for k in ("prompt", "messages"))
        raise InputError(
            f"no column {wanted}; found {', '.join(map(str, row)) or 'none'}. Name yours with --data.columns.prompt"
        )
    column = columns.get(key, key)
    messages = reader.without_response(reader.prompt(row, column, whole=key == "messages"), column)
    id_column = columns.get("prompt_id", "prompt_id")
    prompt_id = row.get(id_column)
    if prompt_id is None:
        if "prompt_id" in columns and id_column not in row:
            raise InputError(f"no column `{id_column}`; found {', '.join(row)}")
        prompt_id = f"row-{number}"
    elif not isinstance(prompt_id, str | int) or isinstance(prompt_id, bool) or prompt_id == "":
        raise InputError(f"`{id_column}` is {prompt_id!r}; expected text or a whole number")
    tools_column = columns.get("tools", "tools")
    tools = reader.tools(row, tools_column)
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
    """The prompts with token ids that fit, and how many were too long.

    Raises:
        InputError: The chat template can't render some: up to 10 are listed.
    """
    kwargs = dict(chat_template_kwargs or {})
    table = token_table(
        prompts,
        lambda prompt: [encode_prompt(tokenizer, prompt.messages, prompt.tools, kwargs)],
        ["ids"],
        Recipe(tokenizer, {"prompt": kwargs}, option),
        lambda prompt: [prompt.messages, prompt.tools],
    )
    kept = [
        replace(prompt, token_ids=array("i", ids.tobytes()), chat_template_kwargs=kwargs)
        for prompt, ids in zip(prompts, token_lists(table, "ids"), strict=True)
        if len(ids) <= max_prompt_tokens
    ]
    return kept, len(prompts) - len(kept)


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
