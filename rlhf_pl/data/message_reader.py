"""Reads what rows hold in place of messages, in the same way for all stages."""

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
    """The reader of one source.

    Messages are a list of objects, one object, or either as JSON text. A dialogue is text that begins with `Human:` and
    goes on in turns of `\\n\\nAssistant:` and `\\n\\nHuman:`. Other text is what a user says.

    Args:
        parse_dialogues: Whether dialogues become messages; else they are text like any other.
    """

    def __init__(self, parse_dialogues: bool = True) -> None:
        self.parse_dialogues = parse_dialogues
        self._dialogues = self._responses = self._answered = 0
        self._counted: Row | None = None

    def messages(self, row: Row, column: str) -> list[Message] | None:
        """The messages in a column; None if it holds text that is none.

        Raises:
            InputError: They are no messages, or wrong ones.
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
        found = _cleaned(value, isinstance(row, ArrowRow) and not is_text)
        checked = found[:-1] if len(found) > 1 and _is_empty_response(found[-1]) else found
        if problem := find_conversation_problem(checked):
            raise InputError(f"`{column}`: {problem}")
        return found

    def dialogue(self, row: Row, column: str, is_prompt: bool = False) -> list[Message] | None:
        """A dialogue's messages; None for other text.

        It ends with a response (perhaps an empty one), or if `is_prompt` with nothing after `\\n\\nAssistant:`.
        """
        text = row[column]
        found = _TURN.match(text)
        if not self.parse_dialogues or found is None or found[1] != "Human":
            return None
        parts = _TURN.split(text)[1:]
        turns = [(who, said.strip()) for who, said in zip(parts[::2], parts[1::2], strict=True)]
        who, last = turns[-1]
        if who != "Assistant" or (is_prompt and last):
            self._answered += who == "Assistant"
            return None
        roles = {"Human": "user", "Assistant": "assistant"}
        messages = [{"role": roles[who], "content": said} for who, said in turns]
        if problem := find_conversation_problem(messages[: None if last else -1]):
            raise InputError(f"`{column}`: {problem} (a dialogue of Human and Assistant)")
        self._dialogues += row is not self._counted
        self._counted = row
        return messages

    def conversation(self, row: Row, column: str) -> list[Message] | None:
        """Messages or a dialogue, with whatever stands at their end; None for other text."""
        found = self.messages(row, column)
        return self.dialogue(row, column) if found is None else found

    def prompt(self, row: Row, column: str, whole: bool = False) -> list[Message]:
        """What a response is to follow.

        Args:
            row: The row.
            column: Its column with the prompt.
            whole: Whether it may hold a conversation as a dialogue that ends with a response.
        """
        found = self.messages(row, column)
        if found is None:
            if not row[column].strip():
                raise InputError(f"`{column}` is empty; expected text or a list of messages")
            found = self.dialogue(row, column, is_prompt=not whole)
            if found is not None and not found[-1]["content"]:
                found = found[:-1]
        return [{"role": "user", "content": row[column]}] if found is None else found

    def without_response(self, messages: list[Message], column: str) -> list[Message]:
        """The messages up to the response at their end, where there is one."""
        end = len(messages)
        while end and messages[end - 1]["role"] == "assistant":
            end -= 1
        if not end:
            raise InputError(f"`{column}`: the message list is empty but for a response")
        self._responses += end < len(messages)
        return messages[:end]

    def response(self, row: Row, column: str) -> list[Message]:
        """A response: the assistant's message, or messages that end with one, such as a tool call and what follows.

        Beside a prompt that was a dialogue, text loses the white space at its ends, as it does inside of dialogues.
        """
        value = row[column]
        is_text = isinstance(value, str)
        found = self.messages(row, column)
        if found is None or (is_text and found[-1]["role"] != "assistant"):  # a response may be JSON of its own
            said = value.strip() if is_text and row is self._counted else value
            return [{"role": "assistant", "content": said}]
        if found[-1]["role"] != "assistant":
            raise InputError(f"`{column}` does not end with a message of the assistant's")
        return found

    def tools(self, row: Row, column: str) -> list[dict[str, Any]] | None:
        """The tools that a row offers; None for none."""
        value = row.get(column)
        given = value
        filled = isinstance(row, ArrowRow) and not isinstance(value, str)
        if isinstance(value, str) and value.strip():
            try:
                value = loads(value)
            except (ValueError, RecursionError):
                value = given
        if value is None or value == "" or value == []:
            return None
        if not isinstance(value, list | tuple) or not all(isinstance(tool, Mapping) for tool in value):
            raise InputError(
                f"`{column}` is {str(given)[:60]!r}; expected a list of tools (JSON Schemas), or its JSON text. If it "
                "means something else in your data, give another name to `columns.tools`"
            )
        return [_pruned(tool, True) if filled or _has_gaps(tool) else dict(tool) for tool in value]

    def report(self, option: str) -> None:
        """Say once what was taken for what."""
        group = option.rpartition(".")[0]
        name = f"{group}.parse_dialogues" if group else "parse_dialogues"
        if count := self._dialogues:
            what = "one row is a dialogue" if count == 1 else f"{count} rows are dialogues"
            _say(f"{option}: {what} of Human and Assistant, read as messages ({name}: false takes them as text).")
        if count := self._responses:
            what = (
                "one conversation ends with a response" if count == 1 else f"{count} conversations end with a response"
            )
            _say(f"{option}: {what}, which is left out.")
        if count := self._answered:
            what = "one prompt looks like a dialogue that ends" if count == 1 else (
                f"{count} prompts look like dialogues that end"
            )  # fmt: skip
            _say(f"{option}: {what} with a response: taken as text. Name the column with `columns.messages` to have it "
                 "read as a conversation whose response is left out.")  # fmt: skip


def _say(line: str) -> None:
    console.print(line, soft_wrap=True)


def _from_json(text: str, column: str) -> Any:
    """Messages in JSON text; None for other text."""
    if not text.lstrip().startswith(("[", "{", '"')):
        return None
    try:
        value = loads(text)
    except (ValueError, RecursionError) as error:
        if _LIKE_MESSAGES.match(text) and not _goes_on(text, error):
            raise InputError(
                f"`{column}` looks like messages, but is no JSON ({error}); write the list with json.dumps"
            ) from error
        return None
    if isinstance(value, str):  # written as JSON twice
        return _from_json(value, column)
    entries = value if isinstance(value, list) else [value]
    return entries if entries and all(map(_is_message, entries)) else None


def _goes_on(text: str, error: Exception) -> bool:
    """Whether text that begins with a JSON value goes on in words."""
    if not isinstance(error, json.JSONDecodeError) or error.msg != "Extra data":
        return False
    return not text[error.pos :].startswith(("[", "{", ","))


def _is_empty_response(message: Any) -> bool:
    """Whether it is for the stages to say what becomes of it."""
    return isinstance(message, Mapping) and message.get("role") == "assistant" and message.get("content") == ""


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, Mapping) and isinstance(value.get("role"), str) and bool({"content", *CALL_KEYS} & set(value))
    )


def joined(before: list[Message], answer: list[Message]) -> list[Message]:
    """A prompt with its answer, which may be the whole conversation once more.

    Then the prompt counts for nothing but a system message that the conversation lacks.
    """
    if answer[0]["role"] not in ("system", "developer", "user"):
        return [*before, *answer]
    system = before[:1] if before and before[0]["role"] == "system" != answer[0]["role"] else []
    return [*system, *answer]


def _has_gaps(tool: Any) -> bool:
    """Whether a tool has properties without a schema, because other tools have such: a table made it."""
    if isinstance(tool, list | tuple):
        return any(map(_has_gaps, tool))
    if not isinstance(tool, Mapping):
        return False
    properties = tool.get("properties")
    return (isinstance(properties, Mapping) and None in properties.values()) or any(map(_has_gaps, tool.values()))


def _cleaned(messages: Sequence[Any], filled: bool) -> list[Any]:
    """Messages without the None that stand for missing keys, role and content first.

    Tables (Parquet, the Hub, and JSON that was written from such) have all keys in all messages. Where that shows,
    arguments of tool calls lose their None too; otherwise a null there is what a model wrote.
    """
    given = [message for message in messages if isinstance(message, Mapping)]
    filled = filled or any(m[key] is None for m in given for key in m if key != "content")
    return [_message(m, filled) if isinstance(m, Mapping) else m for m in messages]


def _message(message: Mapping[str, Any], filled: bool) -> Message:
    first = {key: message[key] for key in ("role", "content") if key in message}
    rest = {str(key): value for key, value in message.items() if key not in first and value is not None}
    as_it_is = isinstance(message.get("content"), Mapping) and not filled  # what a tool returned
    return {k: v if k == "content" and as_it_is else _pruned(v, filled) for k, v in (first | rest).items()}


def _pruned(value: Any, filled: bool) -> Any:
    """Without keys that are None; inside of arguments only if `filled`."""
    if isinstance(value, Mapping):
        return {
            str(key): inner if key in ("arguments", "parameters") and not filled else _pruned(inner, filled)
            for key, inner in value.items()
            if inner is not None
        }
    return [_pruned(inner, filled) for inner in value] if isinstance(value, list | tuple) else value
