"""Reads, checks and tokenizes pairs that were sampled and scored elsewhere."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from rlhf_pl.data.files import Row, check_columns, parse_rows
from rlhf_pl.data.message_reader import MessageReader
from rlhf_pl.data.preferences import EqualResponsesError, parse_responses, read_label, read_number
from rlhf_pl.data.stored_groups import PAIRS, TOKENS
from rlhf_pl.models.chat import Message, Tools, encode_conversation, encode_prompt, plain_text, with_system_prompt
from rlhf_pl.models.source import ModelSource
from rlhf_pl.utils.errors import InputError

# our column names, with those of the data sets that REBEL's authors published
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
    "label": (),
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
_REWARDS = ("chosen_reward", "rejected_reward")
_EXCHANGED = (("chosen", "rejected"), ("chosen_tokens", "rejected_tokens"), _LOGPROBS)


@dataclass(frozen=True)
class OfflinePair:
    """A pair with its rewards.

    Args:
        prompt_id: Id of the row.
        prompt_tokens: Token ids before the responses.
        texts: Texts of the responses, chosen first; a tool call as JSON.
        tokens: Token ids of the responses, EOS included.
        rewards: Rewards of the responses, reward units.
        logps: Summed log-probs of the responses under the policy that sampled them, nats; None if unknown.
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
        columns: Our column names mapped to those of the data. Without it, our names and those of the authors' data are
            recognized.
        split: Split of a Hub data set.
        system_prompt: Prepended to conversations without a system prompt.
        chat_template_kwargs: Further variables of the chat template.
        parse_dialogues: Whether text in the form of a dialogue becomes messages.
        use_tokens: Whether token columns are used, if a row has them.
        use_logprobs: Whether log-prob columns are used, if a row has them; they require the token columns.
        max_prompt_tokens: Pairs with longer prompts are dropped.
        max_response_tokens: Pairs with longer responses are dropped.
        needs_rewards: Whether the loss reads the values of rewards. Otherwise a row may have none: the better response
            counts as 1, the other one as 0.
        has_kl: Whether a KL penalty is subtracted from rewards. Without one, pairs with equal rewards are dropped.
        starts_as_reference: Whether the initial policy is the reference. Equal rewards then stay equal despite the KL
            penalty, unless the row has log-probs of another policy.
        dropped: Number of dropped rows by reason.
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
    needs_rewards: bool
    has_kl: bool
    starts_as_reference: bool
    dropped: dict[str, int] = field(default_factory=dict)

    def read(self, source: str, option: str) -> list[OfflinePair]:
        """Read the usable pairs of a source.

        Args:
            source: A file or a Hub id.
            option: The option that names the source, for errors.

        Raises:
            InputError: The source can't be read, rows are invalid, or none is left.
        """
        names = check_columns(self.columns, tuple(ALIASES))
        reader = MessageReader(self.parse_dialogues)

        def parse(where: str, number: int, row: Row) -> OfflinePair | None:
            found = self._parse(row, self._find_columns(row, names), number, reader)
            if isinstance(found, str):
                self.dropped[found] = self.dropped.get(found, 0) + 1
                return None
            return found

        pairs = [pair for pair in parse_rows(source, self.split, option, parse) if pair is not None]
        reader.report(option)
        self.model.check_ids(((p.prompt_id, ids) for p in pairs for ids in (p.prompt_tokens, *p.tokens)), option)
        if not pairs:
            left_out = describe_dropped(self.dropped)
            raise InputError(f"`{option}`: no row of {source!r} is left to train on; left out: {left_out}.")
        return pairs

    def _parse(self, row: Row, columns: Mapping[str, str], number: int, reader: MessageReader) -> OfflinePair | str:
        """A pair, or the reason why its row is dropped."""
        rewards = self._read_rewards(row, columns)
        try:
            before, *responses = parse_responses(row, columns, reader)
        except EqualResponsesError:
            return "equal responses"
        if rewards[0] == rewards[1] and not self.has_kl:
            return "equal rewards"
        texts = [plain_text(response) for response in responses]
        has_tokens = self.use_tokens and all(row.get(columns[name]) is not None for name in _TOKENS)
        if has_tokens:
            prompt, *tokens = (_strip_padding(row[columns[name]], columns[name], self.model) for name in _TOKENS)
            _check_tokenizer(tokens[0], texts[0], columns["chosen_tokens"], self.model.tokenizer)
        else:
            messages, tools = with_system_prompt(before, self.system_prompt), reader.read_tools(row, columns["tools"])
            prompt = encode_prompt(self.model.tokenizer, messages, tools, self.chat_template_kwargs)
            tokens = [self._encode([*messages, response], tools) for response in responses]
        if len(prompt) > self.max_prompt_tokens:
            return "long prompts"
        if max(map(len, tokens)) > self.max_response_tokens:
            return "long responses"
        logps = None
        if has_tokens and self.use_logprobs and all(row.get(columns[name]) is not None for name in _LOGPROBS):
            logps = (
                read_number(row, columns["chosen_logprob"], 0.0),
                read_number(row, columns["rejected_logprob"], 0.0),
            )
        if rewards[0] == rewards[1] and logps is None and self.starts_as_reference:
            return "equal rewards"
        prompt_id = row.get(columns["prompt_id"])
        prompt_id = f"row-{number}" if prompt_id is None else str(prompt_id)
        return OfflinePair(prompt_id, prompt, (texts[0], texts[1]), (tokens[0], tokens[1]), rewards, logps)

    def _find_columns(self, row: Row, names: Mapping[str, str]) -> dict[str, str]:
        """The columns of a row by our names; those of the responses are exchanged where its label says so."""
        columns = {ours: _find_column(ours, row, names) for ours in ALIASES}
        if not self._has_rewards(row, columns) and read_label(row, columns["label"]) < 0.5:
            for chosen, rejected in _EXCHANGED:
                columns[chosen], columns[rejected] = columns[rejected], columns[chosen]
        return columns

    def _has_rewards(self, row: Row, columns: Mapping[str, str]) -> bool:
        """Whether the row has or needs rewards; otherwise its label counts, if it has one."""
        return self.needs_rewards or any(row.get(columns[name]) not in (None, "") for name in _REWARDS)

    def _read_rewards(self, row: Row, columns: Mapping[str, str]) -> tuple[float, float]:
        """Rewards of the chosen and the rejected response; without any, 1 and 0, or equal ones for a tie."""
        if not self._has_rewards(row, columns):
            return 1.0, float(read_label(row, columns["label"]) == 0.5)
        missing = [name for name in _REWARDS if row.get(columns[name]) in (None, "")]
        if missing:
            found = ", ".join(map(str, row))
            way_out = ", or choose a loss without rewards, such as --model.loss DPOLoss" if self.needs_rewards else ""
            raise InputError(
                f"no `{columns[missing[0]]}`; found {found}. Name yours with --data.columns.{missing[0]}{way_out}"
            )
        chosen, rejected = (read_number(row, columns[name], 0.0) for name in _REWARDS)
        return chosen, rejected

    def _encode(self, messages: list[Message], tools: Tools | None) -> list[int]:
        """The token ids of the last message, as if it were a finished sample."""
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
    """The numbers of dropped rows with their reasons, on one line."""
    return ", ".join(f"{count} of {reason}" for reason, count in dropped.items()) or "none"


def _find_column(ours: str, row: Row, names: Mapping[str, str]) -> str:
    """The name of one of our columns in this data."""
    if ours in names:
        return names[ours]
    return next((name for name in (ours, *ALIASES[ours]) if name in row), ours)


def _strip_padding(ids: Any, column: str, model: Any) -> list[int]:
    """Remove padding from both ends: ids outside the vocabulary, the padding id, and an EOS that is repeated."""
    if not isinstance(ids, list | tuple) or not all(isinstance(i, int) for i in ids):
        raise InputError(f"`{column}` is {type(ids).__name__}; expected a list of token ids")
    padding = model.tokenizer.pad_token_id
    size = len(model.tokenizer)
    is_token = [0 <= i < size and not (i == padding and padding not in model.eos_token_ids) for i in ids]
    if True not in is_token:
        raise InputError(f"`{column}` holds only padding")
    first, last = is_token.index(True), len(is_token) - is_token[::-1].index(True)
    eos = model.eos_token_ids
    while last - first > 1 and ids[last - 1] == ids[last - 2] and ids[last - 1] in eos:
        last -= 1  # padded with its EOS: no response has it twice at its end
    start = first
    while last - first > 1 and ids[first] == ids[first + 1] and ids[first] in eos:
        first += 1
    if first > start and ids[first] != model.tokenizer.bos_token_id:
        first += 1
    if not all(is_token[first:last]):
        raise InputError(
            f"`{column}` has ids outside the policy's vocabulary of {size} tokens: they may be of another model. "
            "`data.use_tokens: false` tokenizes the texts"
        )
    return list(ids[first:last])


def _check_tokenizer(ids: Sequence[int], text: str, column: str, tokenizer: Any) -> None:
    """Raise InputError unless token ids decode to the text with the policy's tokenizer."""
    decoded = tokenizer.decode(ids, skip_special_tokens=True)
    if "".join(decoded.split()) != "".join(text.split()):
        raise InputError(
            f"`{column}` decodes to {decoded[:60]!r} with the policy's tokenizer, but the text is {text[:60]!r}: the "
            "ids are of another model. `data.use_tokens: false` tokenizes the texts"
        )


def make_tables(pairs: Sequence[OfflinePair]) -> tuple[pa.Table, pa.Table]:
    """Make the tables of the stages `responses` and `pairs`; each pair has two responses of its own."""
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
