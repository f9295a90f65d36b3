"""Reads messages, dialogues, responses and tools from rows, in the same way for all kinds of training."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_pl.data.files import ArrowRow, Row
from rlhf_pl.models.chat import Message, find_conversation_problem
from rlhf_pl.models.chat_template import CALL_KEYS
from rlhf_pl.utils.console import console
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.unique_keys import loads

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_LIKE_MESSAGES = re.compile(r"\s*\[?\s*\{\s*['\"](?:role|content)['\"]\s*:")


class MessageReader:
    """Reads the rows of one source.

    Messages are a list of objects, one object, or the JSON text of either. A dialogue is text that begins with `Human:`
    and continues with turns of `\\n\\nAssistant:` and `\\n\\nHuman:`. Other text is a user message.

    Args:
        parse_dialogues: Whether dialogues become messages; otherwise they are plain text.
    """

    def __init__(self, parse_dialogues: bool = True) -> None:
        self.parse_dialogues = parse_dialogues
        self._dialogues = self._dropped_responses = self._unparsed_dialogues = 0
        self._last_dialogue_row: Row | None = None

    def read_messages(self, row: Row, column: str) -> list[Message] | None:
        """The messages in a column; None if it holds other text.

        Raises:
            InputError: The column holds something else, or invalid messages.
        """
        value = row[column]
        is_text = isinstance(value, str)
        if is_text:
            value = _from_json(value, column)
            if value is None:
                return None
        if isinstance(value, Mapping):
            value = [value]
        if not isinstance(value, Sequence) or isinstance(value, bytes):
            raise InputError(f"`{column}`: expected text or a list of messages, found {type(value).__name__}")
        found = _clean(value, isinstance(row, ArrowRow) and not is_text)
        checked = found[:-1] if len(found) > 1 and _is_empty_response(found[-1]) else found
        if problem := find_conversation_problem(checked):
            raise InputError(f"`{column}`: {problem}")
        return found

    def read_dialogue(self, row: Row, column: str, is_prompt: bool = False) -> list[Message] | None:
        """The messages of a dialogue; None for other text.

        The last message is the response, which may be empty. If `is_prompt`, it must be empty: the text ends with
        `\\n\\nAssistant:`.
        """
        text = row[column]
        found = _TURN.match(text)
        if not self.parse_dialogues or found is None or found[1] != "Human":
            return None
        parts = _TURN.split(text)[1:]
        turns = [(who, said.strip()) for who, said in zip(parts[::2], parts[1::2], strict=True)]
        who, last = turns[-1]
        if who != "Assistant" or (is_prompt and last):
            self._unparsed_dialogues += who == "Assistant"
            return None
        roles = {"Human": "user", "Assistant": "assistant"}
        messages = [{"role": roles[who], "content": said} for who, said in turns]
        if problem := find_conversation_problem(messages[: None if last else -1]):
            raise InputError(f"`{column}`: {problem} (a dialogue of Human and Assistant)")
        self._dialogues += row is not self._last_dialogue_row
        self._last_dialogue_row = row
        return messages

    def read_conversation(self, row: Row, column: str) -> list[Message] | None:
        """All messages in a column, or of a dialogue in it; None for other text."""
        found = self.read_messages(row, column)
        return self.read_dialogue(row, column) if found is None else found

    def read_prompt(self, row: Row, column: str, may_have_response: bool = False) -> list[Message]:
        """The messages before a response.

        Args:
            row: The row.
            column: The column of the prompt.
            may_have_response: Whether a dialogue in the column may end with a response.
        """
        found = self.read_messages(row, column)
        if found is None:
            if not row[column].strip():
                raise InputError(f"`{column}` is empty; expected text or a list of messages")
            found = self.read_dialogue(row, column, is_prompt=not may_have_response)
            if found is not None and not found[-1]["content"]:
                found = found[:-1]
        return [{"role": "user", "content": row[column]}] if found is None else found

    def drop_response(self, messages: list[Message], column: str) -> list[Message]:
        """The messages without a response at their end."""
        end = len(messages)
        while end and messages[end - 1]["role"] == "assistant":
            end -= 1
        if not end:
            raise InputError(f"`{column}`: the message list holds only a response")
        self._dropped_responses += end < len(messages)
        return messages[:end]

    def read_response(self, row: Row, column: str) -> list[Message]:
        """A response: an assistant message, or several messages that end with one, for example after a tool call.

        If the prompt was a dialogue, text is stripped of surrounding white space, as inside a dialogue.
        """
        value = row[column]
        is_text = isinstance(value, str)
        found = self.read_messages(row, column)
        if found is None or (is_text and found[-1]["role"] != "assistant"):  # the text of a response may be JSON
            text = value.strip() if is_text and row is self._last_dialogue_row else value
            return [{"role": "assistant", "content": text}]
        if found[-1]["role"] != "assistant":
            raise InputError(f"`{column}` does not end with an assistant message")
        return found

    def read_tools(self, row: Row, column: str) -> list[dict[str, Any]] | None:
        """The tools of a row; None if it has none."""
        value = row.get(column)
        original = value
        is_filled = isinstance(row, ArrowRow) and not isinstance(value, str)
        if isinstance(value, str) and value.strip():
            try:
                value = loads(value)
            except (ValueError, RecursionError):
                value = original
        if value is None or value == "" or value == []:
            return None
        if not isinstance(value, list | tuple) or not all(isinstance(tool, Mapping) for tool in value):
            raise InputError(
                f"`{column}` is {str(original)[:60]!r}; expected a list of tools (JSON Schemas), or its JSON text. If "
                "the column has another meaning in your data, set `columns.tools` to another name"
            )
        return [_prune(tool, True) if is_filled or _has_gaps(tool) else dict(tool) for tool in value]

    def report(self, option: str) -> None:
        """Print how many rows were read as dialogues, had a response dropped, or were read as text."""
        group = option.rpartition(".")[0]
        name = f"{group}.parse_dialogues" if group else "parse_dialogues"
        if count := self._dialogues:
            what = "one row is a dialogue" if count == 1 else f"{count} rows are dialogues"
            _print(f"{option}: {what} of Human and Assistant, read as messages ({name}: false reads them as text).")
        if count := self._dropped_responses:
            what = (
                "one conversation ends with a response" if count == 1 else f"{count} conversations end with a response"
            )
            _print(f"{option}: {what}, which is left out.")
        if count := self._unparsed_dialogues:
            what = (
                "one prompt looks like a dialogue that ends"
                if count == 1
                else f"{count} prompts look like dialogues that end"
            )
            _print(
                f"{option}: {what} with a response: read as text. Name the column with `columns.messages` to read it "
                "as a conversation whose response is left out."
            )


def _print(line: str) -> None:
    console.print(line, soft_wrap=True)


def _from_json(text: str, column: str) -> Any:
    """Messages in JSON text; None for other text."""
    if not text.lstrip().startswith(("[", "{", '"')):
        return None
    try:
        value = loads(text)
    except (ValueError, RecursionError) as error:
        if _LIKE_MESSAGES.match(text) and not _continues_as_text(text, error):
            raise InputError(
                f"`{column}` looks like messages, but is not JSON ({error}); write the list with json.dumps"
            ) from error
        return None
    if isinstance(value, str):  # encoded as JSON twice
        return _from_json(value, column)
    entries = value if isinstance(value, list) else [value]
    return entries if entries and all(map(_is_message, entries)) else None


def _continues_as_text(text: str, error: Exception) -> bool:
    """Whether text that begins with a JSON value continues with plain text."""
    if not isinstance(error, json.JSONDecodeError) or error.msg != "Extra data":
        return False
    return not text[error.pos :].startswith(("[", "{", ","))


def _is_empty_response(message: Any) -> bool:
    """Whether a message is an empty response, which each DataModule handles in its own way."""
    return isinstance(message, Mapping) and message.get("role") == "assistant" and message.get("content") == ""


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, Mapping) and isinstance(value.get("role"), str) and bool({"content", *CALL_KEYS} & set(value))
    )


def join_response(before: list[Message], response: list[Message]) -> list[Message]:
    """Append a response to its prompt.

    If `response` is the whole conversation, only a system message that it lacks is taken from the prompt.
    """
    if response[0]["role"] not in ("system", "developer", "user"):
        return [*before, *response]
    system = before[:1] if before and before[0]["role"] == "system" != response[0]["role"] else []
    return [*system, *response]


def _has_gaps(tool: Any) -> bool:
    """Whether a tool has properties that are None: it comes from a table, in which other tools have them."""
    if isinstance(tool, list | tuple):
        return any(map(_has_gaps, tool))
    if not isinstance(tool, Mapping):
        return False
    properties = tool.get("properties")
    return (isinstance(properties, Mapping) and None in properties.values()) or any(map(_has_gaps, tool.values()))


def _clean(messages: Sequence[Any], is_filled: bool) -> list[Any]:
    """Remove the None of missing keys from messages, and put role and content first.

    In tables (Parquet, the Hub, and JSON written from them) all messages have all keys. If messages show that they come
    from a table, None is removed from arguments of tool calls too; otherwise a null there was written by a model.
    """
    objects = [message for message in messages if isinstance(message, Mapping)]
    is_filled = is_filled or any(m[key] is None for m in objects for key in m if key != "content")
    return [_clean_message(m, is_filled) if isinstance(m, Mapping) else m for m in messages]


def _clean_message(message: Mapping[str, Any], is_filled: bool) -> Message:
    first = {key: message[key] for key in ("role", "content") if key in message}
    rest = {str(key): value for key, value in message.items() if key not in first and value is not None}
    is_tool_result = isinstance(message.get("content"), Mapping) and not is_filled
    return {k: v if k == "content" and is_tool_result else _prune(v, is_filled) for k, v in (first | rest).items()}


def _prune(value: Any, is_filled: bool) -> Any:
    """Remove keys that are None; in arguments of tool calls only if `is_filled`."""
    if isinstance(value, Mapping):
        return {
            str(key): inner if key in ("arguments", "parameters") and not is_filled else _prune(inner, is_filled)
            for key, inner in value.items()
            if inner is not None
        }
    return [_prune(inner, is_filled) for inner in value] if isinstance(value, list | tuple) else value
