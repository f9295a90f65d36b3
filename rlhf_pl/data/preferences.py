"""Preference rows: two answers to one prompt, one of them preferred, in the forms in which people publish them."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rlhf_pl.data.files import Row, check_columns, parse_rows
from rlhf_pl.data.message_reader import MessageReader, joined
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


@dataclass(frozen=True)
class Preference:
    """One comparison.

    Args:
        messages: The conversation before the answers, system prompt included.
        responses: The assistant's messages, the preferred one first.
        label: Probability that `chosen` is the better one: 1, or 0.5 for a tie.
        margin: By how much the chosen answer's score should be higher at least, reward units.
        columns: The row's other columns.
        tools: What the chat template is given as `tools`.
        name: Where the row stands.
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
        """Text of the preferred answer; empty for a tool call alone."""
        return message_text(self.responses[0])

    @property
    def rejected(self) -> str:
        """Text of the other one."""
        return message_text(self.responses[1])


class WrongPairError(InputError):
    """A pair that nothing can be learned from: equal answers, or an empty one."""


class EqualAnswersError(WrongPairError):
    """Both answers are the same."""


@dataclass(frozen=True)
class Preferences:
    """What a file holds.

    Args:
        pairs: The usable comparisons.
        dropped: Rows left out, by reason.
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
    """All comparisons of a file or a Hub data set.

    A row has `chosen` and `rejected`: texts, answers as lists of messages, or whole conversations that share their
    beginning. The prompt is in `prompt` (text or messages), or it is that shared beginning; texts of the form
    `\\n\\nHuman: ... \\n\\nAssistant: ...` are taken apart into messages. `label` may say how sure it is that `chosen`
    is better (1, 0.5 or `tie`, 0), `margin` by how much; `tools` may hold what the chat template is given as such.

    Args:
        source: A .jsonl, .json, .csv or .parquet file, or a Hub id.
        columns: What the data calls our columns, such as `{"chosen": "better"}`.
        system_prompt: Put in front of conversations that have none.
        split: Split of a Hub data set.
        ties: Leave rows without a preference out, or keep them with the label 0.5.
        on_wrong_pairs: What becomes of rows with equal or empty answers.
        option: The option that names the source, for errors.
        parse_dialogues: Whether texts of the form `\\n\\nHuman: ... \\n\\nAssistant: ...` become messages.

    Raises:
        InputError: The source can't be read, or rows are wrong: up to 10 are listed.
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
        raise InputError(f"`{option}`: no row of {source!r} is left: {dropped['tie']} ties and "
                         f"{dropped['equal_or_empty']} pairs of equal or empty answers are left out.")  # fmt: skip
    return Preferences(pairs, dropped)


def parse_preference(row: Row, names: Mapping[str, str], reader: MessageReader) -> Preference:
    """A row as a comparison.

    Raises:
        WrongPairError: Its answers are equal, or one is empty.
        InputError: It is no comparison at all.
    """
    columns = {key: names.get(key, key) for key in COLUMNS}
    messages, *responses = parse_answers(row, columns, reader)
    label, margin = _label(row, columns["label"]), number_of(row, columns["margin"], 0.0)
    if margin < 0:
        raise InputError(f"`{columns['margin']}` is {margin}; expected 0 or more")
    if label < 0.5:
        responses, label = responses[::-1], 1 - label
    tools = reader.tools(row, columns["tools"])
    rest = {str(k): v for k, v in row.items() if k not in columns.values() or k == columns["tools"]}
    return Preference(messages, (responses[0], responses[1]), label, margin, rest, tools)


def parse_answers(
    row: Row, columns: Mapping[str, str], reader: MessageReader
) -> tuple[list[Message], Message, Message]:
    """(messages of the prompt, chosen answer, rejected answer) of a row.

    Args:
        row: The row.
        columns: What it calls `prompt`, `chosen` and `rejected`.
        reader: Reads messages.

    Raises:
        WrongPairError: The answers are equal (EqualAnswersError), or one is empty.
        InputError: It has no two answers to one prompt.
    """
    for key in ("chosen", "rejected"):
        if columns[key] not in row:
            found = ", ".join(map(str, row)) or "none"
            raise InputError(f"no column `{columns[key]}`; found {found}. Name yours with --data.columns.{key}")
    messages, chosen, rejected = _take_apart(row, columns, reader)
    if problem := find_prompt_problem(messages):
        raise InputError(f"`{columns['prompt']}`: {problem}")
    for key, response in (("chosen", chosen), ("rejected", rejected)):
        if is_empty(response):
            raise WrongPairError(f"the answer in `{columns[key]}` is empty; expected text")
    if is_same_response(chosen, rejected):
        raise EqualAnswersError(f"`{columns['chosen']}` and `{columns['rejected']}` are the same answer")
    return messages, chosen, rejected


def _label(row: Row, column: str) -> float:
    value = row.get(column)
    if isinstance(value, str) and value.strip().lower() == "tie":
        return 0.5
    label = number_of(row, column, 1.0)
    if not 0 <= label <= 1:
        raise InputError(f"`{column}` is {value!r}; expected 1 (chosen is better), 0.5 or `tie`, or 0")
    return label


def number_of(row: Row, column: str, default: float) -> float:
    """A number in a column, finite and of at most `LARGEST_REWARD` in size; `default` where it is empty."""
    value = row.get(column)
    if value is None or value == "":
        return default
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= LARGEST_REWARD:
        raise InputError(f"`{column}` is {value!r}; expected a number of at most {LARGEST_REWARD:g} in size")
    return number


def _take_apart(row: Row, columns: Mapping[str, str], reader: MessageReader) -> tuple[list[Message], Message, Message]:
    """(messages of the prompt, chosen answer, rejected answer)."""
    prompt, names = columns["prompt"], (columns["chosen"], columns["rejected"])
    asked = row.get(prompt)
    is_blank = asked is None or (isinstance(asked, str) and not asked.strip())
    before = None if is_blank else reader.prompt(row, prompt)
    texts = [row[name] for name in names]
    both = _dialogues(row, names, reader) if all(isinstance(text, str) for text in texts) else None
    both = both or [_response(row, name, reader) for name in names]
    if asked is not None and all(len(answer) == 1 for answer in both):
        return before or reader.prompt(row, prompt), both[0][0], both[1][0]
    if before is not None:
        both = [joined(before, answer) for answer in both]
    elif all(isinstance(row[name], str) and both[i][0].get("content") == row[name] for i, name in enumerate(names)):
        return _shared_text(texts[0], texts[1], columns)
    return _shared_beginning(both[0], both[1], columns)


def _dialogues(row: Row, names: tuple[str, str], reader: MessageReader) -> list[list[Message]] | None:
    """The two answers as whole dialogues; None if they are no such."""
    chosen, rejected = (reader.dialogue(row, name) for name in names)
    if chosen and rejected:
        return [chosen, rejected]
    if chosen or rejected:
        this, other = names if chosen else names[::-1]
        raise InputError(f"`{this}` is a dialogue that ends with a turn of Assistant, and `{other}` is not")
    return None


def _response(row: Row, column: str, reader: MessageReader) -> list[Message]:
    value = row[column]
    if not isinstance(value, str | Mapping | list | tuple):
        found = type(value).__name__
        raise InputError(f"`{column}` is {found}; expected text or a list of messages, like the other answer")
    return reader.response(row, column)


def _shared_beginning(
    chosen: list[Message], rejected: list[Message], columns: Mapping[str, str]
) -> tuple[list[Message], Message, Message]:
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    ends = (chosen[shared:], rejected[shared:])
    if any(len(end) != 1 or end[0]["role"] != "assistant" for end in ends):
        raise InputError(
            f"the conversations in `{columns['chosen']}` and `{columns['rejected']}` part at message {shared}; "
            "expected them to differ in one answer of the assistant's at the end"
        )
    if shared == 0:
        raise InputError(
            f"no column `{columns['prompt']}`, and the answers share no beginning that could be the prompt"
        )
    return chosen[:shared], ends[0][0], ends[1][0]


def _shared_text(chosen: str, rejected: str, columns: Mapping[str, str]) -> tuple[list[Message], Message, Message]:
    """The prompt as the texts' common beginning, up to the end of a word."""
    if chosen == rejected:
        raise EqualAnswersError(f"`{columns['chosen']}` and `{columns['rejected']}` are the same text")
    length = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected))
    )
    shared = re.match(r"(?s).*\s", chosen[:length])
    if shared is None or not shared[0].strip():
        raise InputError(f"no column `{columns['prompt']}`, and the texts share no beginning that could be the prompt")
    end = len(shared[0])
    said = [{"role": "assistant", "content": text[end:]} for text in (chosen, rejected)]
    return [{"role": "user", "content": shared[0].strip()}], said[0], said[1]
