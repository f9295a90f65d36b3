"""Conversations with their answers: rows with `messages`, or with a prompt and a response."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_pl.chat import Message, message_problem, with_system_prompt
from rlhf_pl.data.files import Row, check_columns, parse_rows
from rlhf_pl.data.preferences import prompt_messages
from rlhf_pl.errors import InputError

COLUMNS = ("messages", "prompt", "response")


@dataclass(frozen=True)
class Conversation:
    """A conversation that ends with an answer.

    Args:
        name: The row's `prompt_id`, or where it stands.
        messages: All messages, system prompt included; the last one is the assistant's.
        columns: The row's other columns.
    """

    name: str
    messages: list[Message]
    columns: Mapping[str, Any] = field(default_factory=dict)


def load_conversations(
    source: str,
    columns: Mapping[str, str] | None = None,
    system_prompt: str | None = None,
    split: str = "train",
    option: str = "data.conversations",
) -> list[Conversation]:
    """All conversations of a file or a Hub data set.

    A row has `messages`, or `prompt` (text or messages) and `response` (or `completion`; text, or an assistant's
    message).

    Args:
        source: A .jsonl, .json, .csv or .parquet file, or a Hub id.
        columns: What the data calls our columns, such as `{"prompt": "instruction", "response": "output"}`.
        system_prompt: Put in front of conversations that have none.
        split: Split of a Hub data set.
        option: The option that names the source, for errors.

    Raises:
        InputError: The source can't be read, or rows are wrong: up to 10 are listed.
    """
    names = check_columns(columns, COLUMNS)

    def parse(where: str, number: int, row: Row) -> Conversation:
        messages, used = _messages(row, names)
        rest = {str(k): v for k, v in row.items() if k not in used}
        name = row.get("prompt_id")
        return Conversation(where if name is None else str(name), with_system_prompt(messages, system_prompt), rest)

    return parse_rows(source, split, option, parse)


def _messages(row: Row, names: Mapping[str, str]) -> tuple[list[Message], tuple[str, ...]]:
    """(the conversation, the columns it came from)."""
    column = names.get("messages", "messages")
    if column in row and ("prompt" not in names or row.get(names["prompt"]) is None):
        messages: Any = row[column]
        if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
            raise InputError(f"`{column}` is {type(messages).__name__}; expected a list of messages")
        *before, last = messages
        if not isinstance(last, Mapping) or last.get("role") != "assistant":
            raise InputError(f"`{column}` does not end with a message of the assistant's")
        return [*_prompt(before, column), _answer(last, column)], (column,)
    prompt = names.get("prompt", "prompt")
    given = [names["response"]] if "response" in names else ["response", "completion"]
    response = next((name for name in given if name in row), None)
    if prompt not in row or response is None:
        wanted = f"`{column}`, or `{prompt}` and `{given[0]}`"
        raise InputError(
            f"no column {wanted}; found {', '.join(map(str, row)) or 'none'}. Name yours with --data.columns.response"
        )
    return [*_prompt(row[prompt], prompt), _answer(row[response], response)], (prompt, response)


def _prompt(prompt: Any, column: str) -> list[Message]:
    messages = prompt_messages(prompt, column)
    if problem := message_problem(messages):
        raise InputError(f"`{column}`: {problem}")
    return messages


def _answer(answer: Any, column: str) -> Message:
    if isinstance(answer, list | tuple) and len(answer) == 1:
        answer = answer[0]
    content = answer.get("content") if isinstance(answer, Mapping) else answer
    if not isinstance(content, str):
        raise InputError(f"`{column}`: the answer is {type(content).__name__}; expected text")
    if not content.strip():
        raise InputError(f"`{column}`: the answer is empty")
    return {"role": "assistant", "content": content}
