"""The rows of a planned run over fixed data: how many there are, and how long they are in training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_pl.cli.plan_lengths import (
    CHARACTERS_PER_TOKEN,
    describe_picked,
    estimate_tokens,
    is_file,
    message_characters,
    pick_rows,
)
from rlhf_pl.data import OfflineDataModule, PreferenceDataModule, SFTDataModule
from rlhf_pl.data.conversations import Conversation
from rlhf_pl.data.held_out import count_held_out
from rlhf_pl.data.packing import fill_rows
from rlhf_pl.data.preference_batches import PreferenceDataset
from rlhf_pl.data.preferences import Preference
from rlhf_pl.models.classifier_head import empty_classifier
from rlhf_pl.models.compute import Compute
from rlhf_pl.models.shared_prefix import share_prompts
from rlhf_pl.utils.errors import InputError

_UNKNOWN = 1000  # rows of an epoch where the data set is not here
_NO_TOKENIZER = f"by {CHARACTERS_PER_TOKEN} characters a token, as the tokenizer is not here"


@dataclass(frozen=True)
class PlannedRows:
    """What an epoch trains on, in the units of `data.batch_size`.

    Args:
        noun: What a row is, in the plural.
        count: Rows of an epoch.
        is_known: Whether the data set could be counted.
        typical: Mean tokens of a row; a prompt that several responses share counts once.
        longest: Tokens of the longest row.
        sequence: Tokens of the longest sequence of a row by itself.
        sequences: Sequences of a row.
        is_packed: Whether the sequences are computed without padding, and shared prompts once.
        held_out: Held-out conversations or pairs.
        held_out_tokens: All their tokens.
        source: How the lengths were found, in words.
        max_tokens: Token budget of a micro-batch; None for `data.batch_size` rows.
    """

    noun: str
    count: int
    is_known: bool
    typical: float
    longest: int
    sequence: int
    sequences: float
    is_packed: bool
    held_out: int
    held_out_tokens: float
    source: str
    max_tokens: int | None = None

    def micro_batch(self, batch_size: int, accumulate: int) -> tuple[int, int]:
        """Rows and tokens of a row of the model's input, in a micro-batch of the longest rows.

        Args:
            batch_size: `data.batch_size`.
            accumulate: Micro-batches of an update.
        """
        rows = batch_size
        if self.max_tokens is not None:
            rows = max(1, min(batch_size * accumulate, self.max_tokens // self.longest))
        if self.is_packed:
            return 1, rows * self.longest
        return max(1, round(rows * self.sequences)), self.sequence


def plan_rows(module: Any, data: Any) -> PlannedRows:
    """Count the rows of an epoch and measure their lengths, where they are in a file.

    Raises:
        InputError: The file can't be read, or nothing is left to train on.
    """
    if isinstance(data, SFTDataModule):
        return _conversations(module, data)
    if isinstance(data, PreferenceDataModule):
        return _comparisons(module, data)
    assert isinstance(data, OfflineDataModule)
    return _offline_pairs(module, data)


def _conversations(module: Any, data: SFTDataModule) -> PlannedRows:
    data.check_context(module.source)
    most, packs = data.max_tokens, data.packing
    noun, is_packed = "packed rows" if packs else "conversations", module.attn_implementation == "sdpa"
    if not _is_here(data):
        typical = most if packs else most / 2
        source = f"{noun} of {typical:,.0f} tokens, assumed: {data.source!r} is not a file on this machine"
        held_out = _assumed_held_out(data)
        return PlannedRows(
            noun, _UNKNOWN, False, typical, most, most, 1 + packs, is_packed, held_out, held_out * most / 2, source
        )
    train, val = data.split_rows()

    def characters(conversation: Conversation) -> int:
        return message_characters(conversation.messages)

    def measure(rows: Sequence[Conversation]) -> list[int]:
        if _has_tokenizer(module):
            return [len(example) for example in data.tokenize(rows, module.source, "data.conversations")]
        return [n for n in map(estimate_tokens, map(characters, rows)) if n <= most]

    found = _measure(train, characters, measure, f"all are longer than max_tokens={most}", data.source)
    count = kept = round(len(train) * found.share)
    typical, longest, sequences = found.mean, found.longest, 1.0
    if packs:
        total = kept * found.mean
        count = len(fill_rows(range(kept), found.lengths, most)) if found.is_complete else -int(-total // most)
        typical, sequences, longest = total / count, kept / count, min(most, round(total))
    how = f"conversations of {found.mean:,.0f} tokens on average, {found.longest:,} at most, {found.how(module)}"
    held_out_tokens = len(val) * found.mean
    return PlannedRows(
        noun, count, True, typical, longest, found.longest, sequences, is_packed, len(val), held_out_tokens, how
    )


def _comparisons(module: Any, data: PreferenceDataModule) -> PlannedRows:
    most, budget = min(data.max_tokens, module.source.max_context_tokens), data.max_tokens_per_batch
    shares = _shares_prompts(module)
    if not _is_here(data):
        source = f"pairs of 2 x {most / 2:,.0f} tokens, assumed: {data.source!r} is not a file on this machine"
        held_out = _assumed_held_out(data)
        return PlannedRows(
            "pairs", _UNKNOWN, False, most, 2 * most, most, 2, shares, held_out, float(held_out * most), source, budget
        )
    train, val = data.split_rows()
    sequence = 0

    def characters(pair: Preference) -> int:
        return message_characters([*pair.messages, *pair.responses])

    def measure(rows: Sequence[Preference]) -> list[int]:
        nonlocal sequence
        if not _has_tokenizer(module):
            both = [
                [min(most, estimate_tokens(message_characters([*p.messages, r]))) for r in p.responses] for p in rows
            ]
            sequence = max(sequence, *map(max, both))
            if not shares:
                return [2 * max(pair) for pair in both]
            return [min(2 * most, estimate_tokens(characters(pair))) for pair in rows]
        render, config = module.renderer(most), module.source.config
        pairs = PreferenceDataset(rows, render, config, data.chat_template_kwargs)
        pairs.shares_prompts = shares
        sequence = max([sequence, *(len(row.ids) for both in pairs.rows for row in both)])
        return pairs.lengths()

    found = _measure(train, characters, measure, "there are none", data.source)
    how = f"pairs of {found.mean:,.0f} tokens on average, {found.longest:,} at most, {found.how(module)}"
    how += "" if shares else ", both responses with the prompt, padded to the longer one"
    return PlannedRows(
        "pairs", len(train), True, found.mean, found.longest, sequence, 2, shares, len(val), len(val) * found.mean, how,
        budget,
    )  # fmt: skip


def _offline_pairs(module: Any, data: OfflineDataModule) -> PlannedRows:
    budget, is_packed = data.max_tokens_per_batch, module.attn_implementation == "sdpa"
    prompt, response = data.max_prompt_tokens, data.max_response_tokens
    if not _is_here(data) or not _has_tokenizer(module):
        what = f"{data.source!r}" if not _is_here(data) else "the tokenizer"
        source = f"pairs of half of data.max_prompt_tokens and data.max_response_tokens, assumed: {what} is not here"
        typical, longest = prompt / 2 + response, prompt + 2 * response
        sequence, held_out = prompt + response, _assumed_held_out(data)
        return PlannedRows(
            "pairs", _UNKNOWN, False, typical, longest, sequence, 2, is_packed, held_out, held_out * typical, source,
            budget,
        )  # fmt: skip
    train, val, _ = data.read_pairs(module)
    lengths, val_lengths = (
        [len(pair.prompt_tokens) + sum(map(len, pair.tokens)) for pair in pairs] for pairs in (train, val)
    )
    sequence = max(len(pair.prompt_tokens) + max(map(len, pair.tokens)) for pair in train)
    mean, longest = sum(lengths) / len(lengths), max(lengths)
    how = f"pairs of {mean:,.0f} tokens on average, {longest:,} at most"
    held_out_tokens = float(sum(val_lengths))
    return PlannedRows(
        "pairs", len(train), True, mean, longest, sequence, 2, is_packed, len(val), held_out_tokens, how, budget
    )


@dataclass(frozen=True)
class _Measured:
    """Lengths of measured rows.

    Args:
        lengths: Of the sample, without rows that are left out.
        longest: The longest one, of the rows with the most characters too.
        share: Share of the rows that is not left out.
        rows: Rows in all.
        picked: Rows that were measured.
    """

    lengths: list[int]
    longest: int
    share: float
    rows: int
    picked: int

    @property
    def mean(self) -> float:
        return sum(self.lengths) / len(self.lengths)

    @property
    def is_complete(self) -> bool:
        """Whether all rows were measured."""
        return self.picked == self.rows

    def how(self, module: Any) -> str:
        """How the lengths were counted, in words."""
        if not _has_tokenizer(module):
            return _NO_TOKENIZER
        return f"by the tokenizer{describe_picked(self.picked, self.rows)}"


def _measure(
    rows: Sequence[Any],
    characters: Callable[[Any], int],
    measure: Callable[[Sequence[Any]], list[int]],
    reason: str,
    source: str,
) -> _Measured:
    """Measure a sample of the rows, and the longest ones.

    Args:
        rows: All rows.
        characters: Returns the number of characters of a row.
        measure: Returns the lengths of rows, without those that are left out; tokens.
        reason: Why none may be left, for the error.
        source: The data set, for the error.
    """
    sample, longest = pick_rows(rows, characters)
    lengths, others = measure(sample), measure(longest) if longest else []
    if not lengths:
        raise InputError(f"`data`: no row of {source!r} is left to train on: {reason}.")
    picked = len(sample) + len(longest)
    return _Measured(lengths, max([*lengths, *others]), len(lengths) / len(sample), len(rows), picked)


def _is_here(data: Any) -> bool:
    """Whether both the rows and the held-out ones are files of this machine, or part of them."""
    return is_file(data.source) and (not isinstance(data.val_source, str) or is_file(data.val_source))


def _assumed_held_out(data: Any) -> int:
    """Held-out rows of a data set that is not here; none of a separate one."""
    return 0 if isinstance(data.val_source, str) else count_held_out(_UNKNOWN, data.val_source)


def _has_tokenizer(module: Any) -> bool:
    try:
        return module.source.tokenizer is not None
    except InputError:  # a model on the Hub, which is not here
        return False


def _shares_prompts(module: Any) -> bool:
    """Whether a reward model computes the common prompt of a comparison once, as far as its architecture says."""
    if module.attn_implementation != "sdpa" or module.pair_encoding:
        return False
    return share_prompts(empty_classifier(module.source), Compute())
