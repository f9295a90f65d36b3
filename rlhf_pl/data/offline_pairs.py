"""Pairs with rewards that someone else sampled and scored: read, checked and tokenized."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from rlhf_pl.data.files import Row, check_columns, parse_rows
from rlhf_pl.data.message_reader import MessageReader
from rlhf_pl.data.preferences import EqualAnswersError, number_of, parse_answers
from rlhf_pl.data.stored_groups import PAIRS, TOKENS
from rlhf_pl.models.chat import Message, Tools, encode_conversation, encode_prompt, plain_text, with_system_prompt
from rlhf_pl.models.source import ModelSource
from rlhf_pl.utils.errors import InputError

# our names, and what the published data sets of REBEL's authors call them
ALIASES = {
    "prompt_id": (),
    "prompt": (),
    "chosen": (),
    "rejected": ("reject",),
    "chosen_reward": (),
    "rejected_reward": ("reject_reward",),
    "prompt_tokens": ("llama_prompt_tokens",),
    "chosen_tokens": ("llama_chosen_tokens",),
    "rejected_tokens": ("llama_reject_tokens",),
    "chosen_logprob": (),
    "rejected_logprob": ("reject_logprob",),
    "tools": (),
}
RESPONSES = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("response_index", pa.int32()),
        ("response", pa.string()),
        ("finished", pa.bool_()),
        ("prompt_tokens", TOKENS),
        ("response_tokens", TOKENS),
    ]
)
_TOKENS = ("prompt_tokens", "chosen_tokens", "rejected_tokens")
_LOGPROBS = ("chosen_logprob", "rejected_logprob")


@dataclass(frozen=True)
class OfflinePair:
    """A pair with its rewards.

    Args:
        prompt_id: The row's.
        prompt_tokens: Token ids up to where the responses start.
        texts: The responses, chosen first; a tool call as JSON.
        tokens: Their token ids, EOS included.
        rewards: Theirs, reward units.
        logps: Their summed log-probs under the policy that sampled them, nats; None if unknown.
    """

    prompt_id: str
    prompt_tokens: Sequence[int]
    texts: tuple[str, str]
    tokens: tuple[Sequence[int], Sequence[int]]
    rewards: tuple[float, float]
    logps: tuple[float, float] | None


@dataclass(frozen=True)
class PairReader:
    """Reads the pairs of a file or a Hub data set for a policy.

    Args:
        model: The policy's tokenizer and config.
        columns: What the data calls our columns; None for the same, or what the authors' data calls them.
        split: Split of a Hub data set.
        system_prompt: Put in front of conversations that have none.
        chat_template_kwargs: Further variables of the chat template.
        parse_dialogues: Whether text in the form of a dialogue becomes messages.
        use_tokens: Whether token columns are taken where they are there.
        use_logprobs: Whether log-prob columns are taken where they are there; they need the token columns.
        max_prompt_tokens: Pairs with longer prompts are left out.
        max_response_tokens: Pairs with longer responses are left out.
        has_kl: Whether a KL term is added to rewards; equal rewards teach nothing without one.
        starts_as_reference: Whether the policy starts as the KL term's reference: equal rewards then stay equal, unless
            the row brings the log-probs of another policy.
        dropped: Rows that were left out, by the reason.
    """

    model: ModelSource
    columns: Mapping[str, str] | None
    split: str
    system_prompt: str | None
    chat_template_kwargs: Mapping[str, Any]
    parse_dialogues: bool
    use_tokens: bool
    use_logprobs: bool
    max_prompt_tokens: int
    max_response_tokens: int
    has_kl: bool
    starts_as_reference: bool
    dropped: dict[str, int] = field(default_factory=dict)

    def read(self, source: str, option: str) -> list[OfflinePair]:
        """The pairs that can be trained on.

        Args:
            source: A file or a Hub id.
            option: The option that names it, for errors.

        Raises:
            InputError: The source can't be read, rows are wrong, or none is left.
        """
        names = check_columns(self.columns, tuple(ALIASES))
        reader = MessageReader(self.parse_dialogues)

        def parse(where: str, number: int, row: Row) -> OfflinePair | None:
            columns = {ours: _column(ours, row, names) for ours in ALIASES}
            found = self._parse(row, columns, number, reader)
            if isinstance(found, str):
                self.dropped[found] = self.dropped.get(found, 0) + 1
                return None
            return found

        pairs = [pair for pair in parse_rows(source, self.split, option, parse) if pair is not None]
        reader.report(option)
        self.model.check_ids(((p.prompt_id, ids) for p in pairs for ids in (p.prompt_tokens, *p.tokens)), option)
        if not pairs:
            left_out = describe_dropped(self.dropped)
            raise InputError(f"`{option}`: no row of {source!r} is left to train on: {left_out}.")
        return pairs

    def _parse(self, row: Row, columns: Mapping[str, str], number: int, reader: MessageReader) -> OfflinePair | str:
        """A pair, or the reason to leave it out."""
        for name in ("chosen_reward", "rejected_reward"):
            if row.get(columns[name]) in (None, ""):
                found = ", ".join(map(str, row))
                raise InputError(f"no `{columns[name]}`; found {found}. Name yours with --data.columns.{name}")
        rewards = (number_of(row, columns["chosen_reward"], 0.0), number_of(row, columns["rejected_reward"], 0.0))
        try:
            before, *responses = parse_answers(row, columns, reader)
        except EqualAnswersError:
            return "equal answers"
        if rewards[0] == rewards[1] and not self.has_kl:
            return "equal rewards"
        texts = [plain_text(response) for response in responses]
        has_tokens = self.use_tokens and all(row.get(columns[name]) is not None for name in _TOKENS)
        if has_tokens:
            prompt, *tokens = (_without_padding(row[columns[name]], columns[name], self.model) for name in _TOKENS)
            _check_tokenizer(tokens[0], texts[0], columns["chosen_tokens"], self.model.tokenizer)
        else:
            messages, tools = with_system_prompt(before, self.system_prompt), reader.tools(row, columns["tools"])
            prompt = encode_prompt(self.model.tokenizer, messages, tools, self.chat_template_kwargs)
            tokens = [self._encode([*messages, response], tools) for response in responses]
        if len(prompt) > self.max_prompt_tokens:
            return "long prompts"
        if max(map(len, tokens)) > self.max_response_tokens:
            return "long answers"
        logps = None
        if has_tokens and self.use_logprobs and all(row.get(columns[name]) is not None for name in _LOGPROBS):
            logps = (number_of(row, columns["chosen_logprob"], 0.0), number_of(row, columns["rejected_logprob"], 0.0))
        if rewards[0] == rewards[1] and logps is None and self.starts_as_reference:
            return "equal rewards"
        given = row.get(columns["prompt_id"])
        prompt_id = f"row-{number}" if given is None else str(given)
        return OfflinePair(prompt_id, prompt, (texts[0], texts[1]), (tokens[0], tokens[1]), rewards, logps)

    def _encode(self, messages: list[Message], tools: Tools | None) -> list[int]:
        """The token ids of the last message, as if it had been sampled and come to its end."""
        ids, mask = encode_conversation(
            self.model.tokenizer,
            [*messages[:-1], messages[-1] | {"weight": 1}],
            self.model.eos_token_ids,
            False,
            tools,
            self.chat_template_kwargs,
        )
        return [token for token, counts in zip(ids, mask, strict=True) if counts]


def describe_dropped(dropped: Mapping[str, int]) -> str:
    """How many rows were left out, and why, in a line."""
    return ", ".join(f"{count} of {reason}" for reason, count in dropped.items()) or "none"


def _column(ours: str, row: Row, names: Mapping[str, str]) -> str:
    """What this data calls one of our columns."""
    if ours in names:
        return names[ours]
    return next((name for name in (ours, *ALIASES[ours]) if name in row), ours)


def _without_padding(ids: Any, column: str, model: Any) -> list[int]:
    """Token ids without the padding at their ends: ids outside of the vocabulary, and padding that is no EOS."""
    if not isinstance(ids, list | tuple) or not all(isinstance(i, int) for i in ids):
        raise InputError(f"`{column}` is {type(ids).__name__}; expected a list of token ids")
    padding = model.tokenizer.pad_token_id
    size = len(model.tokenizer)
    inside = [0 <= i < size and not (i == padding and padding not in model.eos_token_ids) for i in ids]
    if True not in inside:
        raise InputError(f"`{column}` holds nothing but padding")
    first, last = inside.index(True), len(inside) - inside[::-1].index(True)
    if not all(inside[first:last]):
        raise InputError(f"`{column}` has ids outside of this tokenizer's vocabulary of {size}: another model's?")
    return list(ids[first:last])


def _check_tokenizer(ids: Sequence[int], text: str, column: str, tokenizer: Any) -> None:
    """The token columns must be of the policy's tokenizer."""
    decoded = tokenizer.decode(ids, skip_special_tokens=True)
    if "".join(decoded.split()) != "".join(text.split()):
        raise InputError(
            f"`{column}` reads {decoded[:60]!r} with this policy's tokenizer, but the text is {text[:60]!r}: it is of "
            "another model. `data.use_tokens: false` tokenizes the texts"
        )


def as_tables(pairs: Sequence[OfflinePair]) -> tuple[pa.Table, pa.Table]:
    """Pairs as the stages `responses` and `pairs` of a round; pairs with one prompt id have responses of their own."""
    responses, rows = [], []
    counts: dict[str, int] = {}
    for pair in pairs:
        first = counts.get(pair.prompt_id, 0)
        counts[pair.prompt_id] = first + 2
        rows.append((pair.prompt_id, first, first + 1, *pair.rewards))
        for place in range(2):
            tokens = (pair.prompt_tokens, pair.tokens[place])
            responses.append((pair.prompt_id, first + place, pair.texts[place], True, *tokens))
    return _table(responses, RESPONSES), _table(rows, PAIRS)


def _table(rows: Sequence[tuple[Any, ...]], schema: pa.Schema) -> pa.Table:
    columns = list(zip(*rows, strict=True)) or [()] * len(schema)
    return pa.Table.from_arrays([pa.array(c, t) for c, t in zip(columns, schema.types, strict=True)], schema=schema)
