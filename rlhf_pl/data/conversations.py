"""Conversations with their answers: rows with `messages`, or with a prompt and a response."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf_pl.data.files import Row, check_columns, parse_rows
from rlhf_pl.data.message_reader import MessageReader, joined
from rlhf_pl.models.chat import Message, Tools, find_prompt_problem, is_empty, with_system_prompt
from rlhf_pl.utils.errors import InputError

COLUMNS = ("messages", "prompt", "response", "tools")


@dataclass(frozen=True)
class Conversation:
    """A conversation that ends with an answer.

    Args:
        name: The row's `prompt_id`, or where it stands.
        messages: All messages, system prompt included; the last one is the assistant's.
        columns: The row's other columns.
        tools: What the chat template is given as `tools`.
    """

    name: str
    messages: list[Message]
    columns: Mapping[str, Any] = field(default_factory=dict)
    tools: Tools | None = None


def load_conversations(
    source: str,
    columns: Mapping[str, str] | None = None,
    system_prompt: str | None = None,
    split: str = "train",
    option: str = "data.conversations",
    parse_dialogues: bool = True,
) -> list[Conversation]:
    """All conversations of a file or a Hub data set.

    A row has `messages`, or `prompt` (text or messages) and `response` (or `completion`; text, or messages that end
    with the assistant's). It may have `tools`.

    Args:
        source: A .jsonl, .json, .csv or .parquet file, or a Hub id.
        columns: What the data calls our columns, such as `{"prompt": "instruction", "response": "output"}`.
        system_prompt: Put in front of conversations that have none.
        split: Split of a Hub data set.
        option: The option that names the source, for errors.
        parse_dialogues: Whether text of the form `\\n\\nHuman: ... \\n\\nAssistant: ...` becomes messages.

    Raises:
        InputError: The source can't be read, or rows are wrong: up to 10 are listed.
    """
    names = check_columns(columns, COLUMNS)
    reader = MessageReader(parse_dialogues)

    def parse(where: str, number: int, row: Row) -> Conversation:
        messages, used = _messages(row, names, reader)
        rest = {str(k): v for k, v in row.items() if k not in used}
        name = row.get("prompt_id")
        tools = reader.tools(row, names.get("tools", "tools"))
        messages = with_system_prompt(messages, system_prompt)
        return Conversation(where if name is None else str(name), messages, rest, tools)

    found = parse_rows(source, split, option, parse)
    reader.report(option)
    return found


def _messages(row: Row, names: Mapping[str, str], reader: MessageReader) -> tuple[list[Message], tuple[str, ...]]:
    """(the conversation, the columns it came from)."""
    column = names.get("messages", "messages")
    is_there = row.get(column) is not None or (column in row and row.get(names.get("prompt", "prompt")) is None)
    if is_there and ("prompt" not in names or row.get(names["prompt"]) is None):
        messages = reader.conversation(row, column)
        if messages is None:
            raise InputError(f"`{column}` is text; expected a list of messages, or its JSON text")
        if messages[-1]["role"] != "assistant":
            raise InputError(f"`{column}` does not end with a message of the assistant's")
        if len(messages) == 1:
            raise InputError(f"`{column}`: the message list is empty but for a response")
        if is_empty(messages[-1]):
            raise InputError(f"`{column}`: the answer is empty")
        return messages, (column,)
    prompt = names.get("prompt", "prompt")
    given = [names["response"]] if "response" in names else ["response", "completion"]
    response = next((name for name in given if name in row), None)
    if prompt not in row or response is None:
        wanted = f"`{column}`, or `{prompt}` and `{given[0]}`"
        raise InputError(
            f"no column {wanted}; found {', '.join(map(str, row)) or 'none'}. Name yours with --data.columns.response"
        )
    before, answer = reader.prompt(row, prompt), reader.response(row, response)
    if isinstance(row[response], str) and (whole := reader.dialogue(row, response)):
        answer = whole
    elif problem := find_prompt_problem(before):
        raise InputError(f"`{prompt}`: {problem}")
    if is_empty(answer[-1]):
        raise InputError(f"`{response}`: the answer is empty")
    return joined(before, answer), (prompt, response)
