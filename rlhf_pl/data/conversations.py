"""Conversations for supervised fine-tuning: rows with `messages`, or with a prompt and a response."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf_pl.data.files import Row, check_columns, parse_rows
from rlhf_pl.data.message_reader import MessageReader, join_response
from rlhf_pl.models.chat import Message, Tools, find_prompt_problem, is_empty, with_system_prompt
from rlhf_pl.utils.errors import InputError

COLUMNS = ("messages", "prompt", "response", "tools")


@dataclass(frozen=True)
class Conversation:
    """A conversation that ends with a response.

    Args:
        name: The row's `prompt_id`, or its position in the source.
        messages: All messages, system prompt included; the last one is the assistant's.
        columns: The row's other columns.
        tools: The `tools` of the chat template.
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
    """Load all conversations of a file or a Hub data set.

    A row has `messages`, or `prompt` (text or messages) and `response` (or `completion`; text, or messages that end
    with the assistant's). It may have `tools`.

    Args:
        source: A .jsonl, .json, .csv or .parquet file, or a Hub id.
        columns: Our column names mapped to those of the data, e.g. `{"prompt": "instruction", "response": "output"}`.
        system_prompt: Prepended to conversations without a system prompt.
        split: Split of a Hub data set.
        option: The option that names the source, for errors.
        parse_dialogues: Whether text of the form `\\n\\nHuman: ... \\n\\nAssistant: ...` becomes messages.

    Raises:
        InputError: The source can't be read, or rows are invalid: up to 10 are listed.
    """
    names = check_columns(columns, COLUMNS)
    reader = MessageReader(parse_dialogues)

    def parse(where: str, number: int, row: Row) -> Conversation:
        messages, used = _read_messages(row, names, reader)
        rest = {str(k): v for k, v in row.items() if k not in used}
        name = row.get("prompt_id")
        tools = reader.read_tools(row, names.get("tools", "tools"))
        messages = with_system_prompt(messages, system_prompt)
        return Conversation(where if name is None else str(name), messages, rest, tools)

    found = parse_rows(source, split, option, parse)
    reader.report(option)
    return found


def _read_messages(row: Row, names: Mapping[str, str], reader: MessageReader) -> tuple[list[Message], tuple[str, ...]]:
    """(messages of a conversation, names of the columns that they were read from)."""
    column = names.get("messages", "messages")
    has_messages = row.get(column) is not None or (column in row and row.get(names.get("prompt", "prompt")) is None)
    if has_messages and ("prompt" not in names or row.get(names["prompt"]) is None):
        messages = reader.read_conversation(row, column)
        if messages is None:
            raise InputError(f"`{column}` is text; expected a list of messages, or its JSON text")
        if messages[-1]["role"] != "assistant":
            raise InputError(f"`{column}` does not end with an assistant message")
        if len(messages) == 1:
            raise InputError(f"`{column}`: the message list holds only a response")
        if is_empty(messages[-1]):
            raise InputError(f"`{column}`: the response is empty")
        return messages, (column,)
    prompt = names.get("prompt", "prompt")
    candidates = [names["response"]] if "response" in names else ["response", "completion"]
    response_column = next((name for name in candidates if name in row), None)
    if prompt not in row or response_column is None:
        required = f"`{column}`, or `{prompt}` and `{candidates[0]}`"
        raise InputError(
            f"no column {required}; found {', '.join(map(str, row)) or 'none'}. Name yours with --data.columns.response"
        )
    before, response = reader.read_prompt(row, prompt), reader.read_response(row, response_column)
    if isinstance(row[response_column], str) and (dialogue := reader.read_dialogue(row, response_column)):
        response = dialogue
    elif problem := find_prompt_problem(before):
        raise InputError(f"`{prompt}`: {problem}")
    if is_empty(response[-1]):
        raise InputError(f"`{response_column}`: the response is empty")
    return join_response(before, response), (prompt, response_column)
