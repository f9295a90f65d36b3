"""Reads preference rows, two responses to a prompt with one preferred, in the forms of published data sets."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rlhf_pl.data.files import Row, check_columns, parse_rows
from rlhf_pl.data.message_reader import MessageReader, join_response
from rlhf_pl.models.chat import (
    Message,
    Tools,
    find_prompt_problem,
    is_empty,
    is_same_response,
    message_text,
    with_system_prompt,
)
from rlhf_pl.utils.errors import LARGEST_REWARD, InputError

COLUMNS = ("prompt", "chosen", "rejected", "label", "margin", "tools")

PromptAndResponses = tuple[list[Message], Message, Message]  # prompt, chosen response, rejected response


@dataclass(frozen=True)
class Preference:
    """One comparison.

    Args:
        messages: The conversation before the responses, system prompt included.
        responses: The assistant messages, the preferred one first.
        label: Probability that `chosen` is better: 1, or 0.5 for a tie.
        margin: Minimum difference of the scores, reward units.
        columns: The row's other columns.
        tools: The `tools` of the chat template.
        name: Position of the row in the source.
    """

    messages: list[Message]
    responses: tuple[Message, Message]
    label: float = 1.0
    margin: float = 0.0
    columns: Mapping[str, Any] = field(default_factory=dict)
    tools: Tools | None = None
    name: str = ""

    @property
    def chosen(self) -> str:
        """Text of the preferred response; empty for a message with only tool calls."""
        return message_text(self.responses[0])

    @property
    def rejected(self) -> str:
        """Text of the other response."""
        return message_text(self.responses[1])


class WrongPairError(InputError):
    """A pair without a preference to learn: its responses are equal, or one is empty."""


class EqualResponsesError(WrongPairError):
    """Both responses are the same."""


@dataclass(frozen=True)
class Preferences:
    """The comparisons of a source.

    Args:
        pairs: The usable comparisons.
        dropped: Number of dropped rows by reason.
    """

    pairs: list[Preference]
    dropped: dict[str, int]


def load_preferences(
    source: str,
    columns: Mapping[str, str] | None = None,
    system_prompt: str | None = None,
    split: str = "train",
    ties: Literal["drop", "half"] = "drop",
    on_wrong_pairs: Literal["error", "drop"] = "error",
    option: str = "data.preferences",
    parse_dialogues: bool = True,
) -> Preferences:
    """Load all comparisons of a file or a Hub data set.

    A row has `chosen` and `rejected`: texts, responses as lists of messages, or whole conversations with a common
    beginning. The prompt is in `prompt` (text or messages), or it is this common beginning. Text of the form
    `\\n\\nHuman: ... \\n\\nAssistant: ...` is parsed into messages. A row may have `label`, the probability that
    `chosen` is better (1, 0.5 or `tie`, 0), `margin`, and `tools` for the chat template.

    Args:
        source: A .jsonl, .json, .csv or .parquet file, or a Hub id.
        columns: Our column names mapped to those of the data, e.g. `{"chosen": "better"}`.
        system_prompt: Prepended to conversations without a system prompt.
        split: Split of a Hub data set.
        ties: Drop rows without a preference, or keep them with the label 0.5.
        on_wrong_pairs: Raise for rows with equal or empty responses, or drop them.
        option: The option that names the source, for errors.
        parse_dialogues: Whether text of the form `\\n\\nHuman: ... \\n\\nAssistant: ...` becomes messages.

    Raises:
        InputError: The source can't be read, or rows are invalid: up to 10 are listed.
    """
    names = check_columns(columns, COLUMNS)
    dropped = {"tie": 0, "equal_or_empty": 0}
    reader = MessageReader(parse_dialogues)

    def parse(where: str, number: int, row: Row) -> Preference | None:
        try:
            pair = parse_preference(row, names, reader)
        except WrongPairError as error:
            if on_wrong_pairs == "drop":
                dropped["equal_or_empty"] += 1
                return None
            raise InputError(f"{error}. `data.on_wrong_pairs: drop` leaves such rows out") from error
        if pair.label == 0.5 and ties == "drop":
            dropped["tie"] += 1
            return None
        return replace(pair, name=where, messages=with_system_prompt(pair.messages, system_prompt))

    pairs = [pair for pair in parse_rows(source, split, option, parse) if pair is not None]
    reader.report(option)
    if not pairs:
        raise InputError(
            f"`{option}`: no row of {source!r} is left: {dropped['tie']} ties and {dropped['equal_or_empty']} pairs "
            "with equal or empty responses are left out."
        )
    return Preferences(pairs, dropped)


def parse_preference(row: Row, names: Mapping[str, str], reader: MessageReader) -> Preference:
    """Parse a row into a comparison.

    Raises:
        WrongPairError: The responses are equal, or one is empty.
        InputError: The row is not a comparison.
    """
    columns = {key: names.get(key, key) for key in COLUMNS}
    messages, *responses = parse_responses(row, columns, reader)
    label, margin = read_label(row, columns["label"]), read_number(row, columns["margin"], 0.0)
    if margin < 0:
        raise InputError(f"`{columns['margin']}` is {margin}; expected 0 or more")
    if label < 0.5:
        responses, label = responses[::-1], 1 - label
    tools = reader.read_tools(row, columns["tools"])
    rest = {str(k): v for k, v in row.items() if k not in columns.values() or k == columns["tools"]}
    return Preference(messages, (responses[0], responses[1]), label, margin, rest, tools)


def parse_responses(row: Row, columns: Mapping[str, str], reader: MessageReader) -> PromptAndResponses:
    """Parse the prompt and both responses of a row.

    Args:
        row: The row.
        columns: `prompt`, `chosen` and `rejected` mapped to the names of the row's columns.
        reader: Reads messages.

    Raises:
        WrongPairError: The responses are equal (EqualResponsesError), or one is empty.
        InputError: The row does not have two responses to one prompt.
    """
    for key in ("chosen", "rejected"):
        if columns[key] not in row:
            found = ", ".join(map(str, row)) or "none"
            raise InputError(f"no column `{columns[key]}`; found {found}. Name yours with --data.columns.{key}")
    messages, chosen, rejected = _split_prompt(row, columns, reader)
    if problem := find_prompt_problem(messages):
        raise InputError(f"`{columns['prompt']}`: {problem}")
    for key, response in (("chosen", chosen), ("rejected", rejected)):
        if is_empty(response):
            raise WrongPairError(f"the response in `{columns[key]}` is empty; expected text")
    if is_same_response(chosen, rejected):
        raise EqualResponsesError(f"`{columns['chosen']}` and `{columns['rejected']}` are the same response")
    return messages, chosen, rejected


def read_label(row: Row, column: str) -> float:
    """Probability that the chosen response is the better one: 1 if the column is empty, 0.5 for a tie."""
    value = row.get(column)
    if isinstance(value, str) and value.strip().lower() == "tie":
        return 0.5
    label = read_number(row, column, 1.0)
    if not 0 <= label <= 1:
        raise InputError(f"`{column}` is {value!r}; expected 1 (chosen is better), 0.5 or `tie`, or 0")
    return label


def read_number(row: Row, column: str, default: float) -> float:
    """The number in a column, of absolute value at most `LARGEST_REWARD`; `default` if the column is empty."""
    value = row.get(column)
    if value is None or value == "":
        return default
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= LARGEST_REWARD:
        raise InputError(f"`{column}` is {value!r}; expected a number of absolute value at most {LARGEST_REWARD:g}")
    return number


def _split_prompt(row: Row, columns: Mapping[str, str], reader: MessageReader) -> PromptAndResponses:
    prompt, names = columns["prompt"], (columns["chosen"], columns["rejected"])
    value = row.get(prompt)
    is_blank = value is None or (isinstance(value, str) and not value.strip())
    before = None if is_blank else reader.read_prompt(row, prompt)
    texts = [row[name] for name in names]
    both = _read_dialogues(row, names, reader) if all(isinstance(text, str) for text in texts) else None
    both = both or [_read_response(row, name, reader) for name in names]
    if value is not None and all(len(response) == 1 for response in both):
        return before or reader.read_prompt(row, prompt), both[0][0], both[1][0]
    if before is not None:
        both = [join_response(before, response) for response in both]
    elif all(isinstance(row[name], str) and both[i][0].get("content") == row[name] for i, name in enumerate(names)):
        return _split_common_text(texts[0], texts[1], columns)
    return _split_common_messages(both[0], both[1], columns)


def _read_dialogues(row: Row, names: tuple[str, str], reader: MessageReader) -> list[list[Message]] | None:
    """The messages of both columns if they hold whole dialogues; None if neither does."""
    chosen, rejected = (reader.read_dialogue(row, name) for name in names)
    if chosen and rejected:
        return [chosen, rejected]
    if chosen or rejected:
        this, other = names if chosen else names[::-1]
        raise InputError(f"`{this}` is a dialogue that ends with a turn of Assistant, but `{other}` is not")
    return None


def _read_response(row: Row, column: str, reader: MessageReader) -> list[Message]:
    value = row[column]
    if not isinstance(value, str | Mapping | list | tuple):
        found = type(value).__name__
        raise InputError(f"`{column}` is {found}; expected text or a list of messages, like the other response")
    return reader.read_response(row, column)


def _split_common_messages(
    chosen: list[Message], rejected: list[Message], columns: Mapping[str, str]
) -> PromptAndResponses:
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    ends = (chosen[shared:], rejected[shared:])
    if any(len(end) != 1 or end[0]["role"] != "assistant" for end in ends):
        raise InputError(
            f"the conversations in `{columns['chosen']}` and `{columns['rejected']}` differ from message {shared} on; "
            "expected them to differ only in the assistant message at the end"
        )
    if shared == 0:
        raise InputError(
            f"no column `{columns['prompt']}`, and the responses have no common beginning that could be the prompt"
        )
    return chosen[:shared], ends[0][0], ends[1][0]


def _split_common_text(chosen: str, rejected: str, columns: Mapping[str, str]) -> PromptAndResponses:
    """Take the common beginning of two texts, up to the end of a word, as the prompt."""
    if chosen == rejected:
        raise EqualResponsesError(f"`{columns['chosen']}` and `{columns['rejected']}` are the same text")
    length = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected))
    )
    shared = re.match(r"(?s).*\s", chosen[:length])
    if shared is None or not shared[0].strip():
        raise InputError(
            f"no column `{columns['prompt']}`, and the texts have no common beginning that could be the prompt"
        )
    end = len(shared[0])
    responses = [{"role": "assistant", "content": text[end:]} for text in (chosen, rejected)]
    return [{"role": "user", "content": shared[0].strip()}], responses[0], responses[1]
