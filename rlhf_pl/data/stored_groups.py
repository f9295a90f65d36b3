"""Reads the prompt groups that a round trains on, with their tokens and log-probs in Arrow, from its store."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from rlhf_pl.algorithms.prompt_groups import SUMMED, Z_REF
from rlhf_pl.models.packed_batch import PrefixGroup
from rlhf_pl.store.round_store import DamagedStoreError, Round

KEY = ("prompt_id", "response_index")
TOKENS = pa.list_(pa.int32())
# schema of the stage `pairs`: a pair is two indices into the responses of a prompt
PAIRS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("chosen_index", pa.int32()),
        ("rejected_index", pa.int32()),
        ("chosen_reward", pa.float64()),
        ("rejected_reward", pa.float64()),
    ]
)
# schema of the same stage for training on whole prompt groups
GROUPS = pa.schema([("prompt_id", pa.string()), ("response_index", pa.int32()), ("reward", pa.float64())])
MISMATCHED = "mismatched_reference_logp"  # column of the stage `logps`: under the reference, after another prompt
_WHICH = ("chosen", "rejected")
_MAX_RESPONSES = 1 << 31  # exceeds every response index

StoredLogps = Mapping[str, Tensor | pa.ListArray]  # (R,) float32; or a list of float32 per response, M in total


@dataclass(frozen=True)
class StoredPairs:
    """The P pairs of G groups, group after group.

    Args:
        positions: Positions of each pair's chosen and rejected response among those of its group, shape (P, 2), int64.
        counts: Number of pairs of each group, shape (G,), int64.
    """

    positions: np.ndarray
    counts: np.ndarray

    def __post_init__(self) -> None:
        object.__setattr__(self, "_starts", np.concatenate([[0], np.cumsum(self.counts)]))

    def of_group(self, group: int) -> np.ndarray:
        """Positions of the pairs of one group, shape (its pairs, 2)."""
        starts = self._starts  # type: ignore[attr-defined]
        return self.positions[starts[group] : starts[group + 1]]

    @property
    def are_simple(self) -> bool:
        """Whether each group is one pair, (chosen, rejected)."""
        return bool((self.counts == 1).all() and (self.positions == (0, 1)).all())


@dataclass(frozen=True)
class StoredGroups:
    """The R responses that a round trains on, and their G groups: a prompt with the responses that are used.

    Args:
        prompt_ids: Prompt id of each response, length R.
        indices: Index of each response among those of its prompt, shape (R,), int32.
        prompt_tokens: Token ids of each response's prompt, length R.
        response_tokens: Token ids of each response, length R.
        finished: Whether each response ends with an EOS, shape (R,), bool.
        rewards: Shaped rewards, shape (R,), float64, reward units.
        sizes: Number of responses of each group, shape (G,), int64.
        members: Rows (0 to R - 1) of the responses of each group, group after group, int64.
        pairs: The pairs of the groups; None if the round trains on whole groups.
    """

    prompt_ids: pa.Array
    indices: np.ndarray
    prompt_tokens: pa.ListArray
    response_tokens: pa.ListArray
    finished: np.ndarray
    rewards: np.ndarray
    sizes: np.ndarray
    members: np.ndarray
    pairs: StoredPairs | None

    def __post_init__(self) -> None:
        object.__setattr__(self, "_starts", np.concatenate([[0], np.cumsum(self.sizes)]))

    def __len__(self) -> int:
        return len(self.sizes)

    def rows(self, group: int) -> np.ndarray:
        """Rows of a group's responses."""
        starts = self._starts  # type: ignore[attr-defined]
        return self.members[starts[group] : starts[group + 1]]

    def prefix_group(self, group: int) -> PrefixGroup:
        """The tokens of a group's prompt and responses."""
        rows = self.rows(group)
        prompt = self.prompt_tokens[int(rows[0])].values.to_numpy()
        return PrefixGroup(prompt, tuple(self.response_tokens[int(row)].values.to_numpy() for row in rows))

    def response_lengths(self) -> np.ndarray:
        """Number of tokens of each response, shape (R,)."""
        return _lengths(self.response_tokens)

    def lengths(self) -> list[int]:
        """Number of tokens of each group, its prompt counted once."""
        firsts = self.members[self._starts[:-1]]  # type: ignore[attr-defined]
        return (_lengths(self.prompt_tokens)[firsts] + self.sum_per_group(self.response_lengths())).tolist()

    def sum_per_group(self, values: np.ndarray) -> np.ndarray:
        """Sum a value of each response over each group: (R,) to (G,)."""
        if len(self) == 0:
            return np.zeros(0, values.dtype)
        return np.add.reduceat(values[self.members], self._starts[:-1])  # type: ignore[attr-defined]


def read_stored_groups(stored: Round) -> StoredGroups:
    """Read the groups of a round's stage `pairs`, with their tokens from the stage `responses`.

    Raises:
        DamagedStoreError: A file is damaged, or a response is missing.
    """
    table = stored.read("pairs")
    if "prompt_tokens" in table.column_names:
        return read_pair_copies(table)
    pairs = None
    if "chosen_index" in table.column_names:
        prompt_ids = pa.array(np.repeat(table["prompt_id"].to_numpy(zero_copy_only=False), 2), pa.string())
        indices, rewards = _interleave(table, "index").astype(np.int64), _interleave(table, "reward")
        used, sizes, pairs = _group_pairs(table, indices, stored.info("pairs").get("grouped", False))
        prompt_ids, indices, rewards = prompt_ids.take(pa.array(used)), indices[used], rewards[used]
    else:
        prompt_ids = table["prompt_id"].combine_chunks()
        indices, rewards = table["response_index"].to_numpy().astype(np.int64), table["reward"].to_numpy()
        sizes = run_lengths(prompt_ids)
    codes = {prompt_id: code for code, prompt_id in enumerate(pc.unique(prompt_ids).to_pylist())}
    wanted = _make_keys(prompt_ids, indices, codes)
    found, keys = _read_responses(stored, codes, np.unique(wanted))
    order = np.argsort(keys, kind="stable")
    positions = np.searchsorted(keys[order], wanted)
    if len(wanted) and (positions.max() >= len(keys) or (keys[order][positions] != wanted).any()):
        raise DamagedStoreError(f"{stored.path / 'pairs'} names responses that {stored.path / 'responses'} lacks.")
    members = order[positions]
    row_rewards = np.zeros(len(keys))
    row_rewards[members] = rewards
    return StoredGroups(
        found["prompt_id"].combine_chunks(),
        found["response_index"].to_numpy(),
        found["prompt_tokens"].combine_chunks(),
        found["response_tokens"].combine_chunks(),
        found["finished"].to_numpy(),
        row_rewards,
        sizes,
        members,
        pairs,
    )


def read_pair_copies(table: pa.Table) -> StoredGroups:
    """Read pairs that earlier versions stored with copies of their tokens; every pair has responses of its own."""
    count = len(table)

    def both(name: str) -> pa.ListArray:
        columns = [table[f"{which}_{name}"].cast(TOKENS) for which in _WHICH]
        chunks = pa.chunked_array([chunk for column in columns for chunk in column.chunks], TOKENS)
        return chunks.combine_chunks().take(pa.array(np.arange(2 * count).reshape(2, -1).T.ravel()))

    has_indices = "chosen_index" in table.column_names
    twice = pa.array(np.repeat(np.arange(count), 2))
    return StoredGroups(
        table["prompt_id"].combine_chunks().take(twice),
        _interleave(table, "index").astype(np.int32) if has_indices else np.tile(np.arange(2, dtype=np.int32), count),
        table["prompt_tokens"].cast(TOKENS).combine_chunks().take(twice),
        both("tokens"),
        np.ones(2 * count, bool),
        _interleave(table, "reward"),
        np.full(count, 2),
        np.arange(2 * count),
        one_pair_each(count),
    )


def one_pair_each(count: int) -> StoredPairs:
    """The pairs of `count` groups of a chosen and a rejected response."""
    return StoredPairs(np.tile(np.arange(2), (count, 1)), np.ones(count, np.int64))


def order_ties(groups: StoredGroups, penalties: np.ndarray) -> StoredGroups:
    """Order each pair of equal rewards by the penalties of its responses, shape (R,): the lower one is chosen."""
    assert groups.pairs is not None
    starts = np.cumsum(groups.sizes) - groups.sizes
    rows = groups.members[np.repeat(starts, groups.pairs.counts)[:, None] + groups.pairs.positions]
    chosen, rejected = rows.T
    swapped = (groups.rewards[chosen] == groups.rewards[rejected]) & (penalties[chosen] > penalties[rejected])
    if not swapped.any():
        return groups
    positions = np.where(swapped[:, None], groups.pairs.positions[:, ::-1], groups.pairs.positions)
    return replace(groups, pairs=StoredPairs(positions, groups.pairs.counts))


def _group_pairs(table: pa.Table, indices: np.ndarray, by_prompt: bool) -> tuple[np.ndarray, np.ndarray, StoredPairs]:
    """Put pairs into groups.

    Args:
        table: P rows of the stage `pairs`.
        indices: Index of the chosen and the rejected response of each pair among those of its prompt, shape (2 x P,).
        by_prompt: Whether adjacent pairs of a prompt are a group, as selectors make them; otherwise each pair is one.

    Returns:
        (places in `indices` of the responses of all groups, each response once and in the order of its first use;
        number of responses of each group; the pairs).
    """
    if not by_prompt or len(table) == 0:
        return np.arange(len(indices)), np.full(len(table), 2), one_pair_each(len(table))
    counts = run_lengths(table["prompt_id"].combine_chunks())
    if (counts == 1).all():
        return np.arange(len(indices)), np.full(len(table), 2), one_pair_each(len(table))
    group_of = np.repeat(np.arange(len(counts)), 2 * counts)
    _, first, inverse = np.unique(group_of * _MAX_RESPONSES + indices, return_index=True, return_inverse=True)
    order = np.argsort(first)  # of the responses, by their first use; a group's responses are adjacent
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    sizes = np.bincount(group_of[first], minlength=len(counts))
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    positions = rank[inverse] - starts[group_of]
    return first[order], sizes, StoredPairs(positions.reshape(-1, 2), counts)


def read_stored_logps(table: pa.Table, groups: StoredGroups) -> dict[str, Tensor | pa.ListArray]:
    """Read the log-probs and further values per token of a round's stage `logps`, by their names in a loss's `needs`.

    Under the name `Z_REF` are those of the responses to other prompts under the reference.

    Args:
        table: The stage, with a row per response, those of other responses last; in earlier versions, with a row per
            pair.
        groups: The groups of the same round.

    Raises:
        ValueError: The numbers of responses differ.
    """
    logps: dict[str, Tensor | pa.ListArray] = {}
    by_pair = "response_index" not in table.column_names
    if not by_pair:
        table = table.slice(0, len(groups.indices))  # `rollout.store_token_logps` adds those that are not used
    if len(table) * (2 if by_pair else 1) != len(groups.indices):
        raise ValueError(f"{len(groups.indices)} responses, but {len(table)} rows of log-probs.")
    for name in SUMMED:
        column = name.removesuffix("s")
        if by_pair and f"chosen_{column}" in table.column_names:
            logps[name] = torch.tensor(_interleave(table, column), dtype=torch.float32)
        elif column in table.column_names:
            logps[name] = torch.tensor(table[column].to_numpy(), dtype=torch.float32)
    if MISMATCHED in table.column_names:
        logps[Z_REF] = torch.tensor(table[MISMATCHED].to_numpy(), dtype=torch.float32)
    for field in table.schema:
        if pa.types.is_list(field.type):  # per token
            logps[field.name] = table[field.name].combine_chunks()
    return logps


def _read_responses(stored: Round, codes: Mapping[str, int], wanted: np.ndarray) -> tuple[pa.Table, np.ndarray]:
    """Read the responses with the keys `wanted`, which is sorted, and their keys, shard by shard to limit memory."""
    columns = [*KEY, "finished", "prompt_tokens", "response_tokens"]
    parts, part_keys, with_end = [], [], np.append(wanted, -1)
    for table in stored.read_shards("responses", columns):
        keys = _make_keys(table["prompt_id"].combine_chunks(), table["response_index"].to_numpy(), codes)
        is_used = with_end[np.searchsorted(wanted, keys)] == keys  # `isin` would sort all of `wanted` for each shard
        parts.append(table.filter(pa.array(is_used)))
        part_keys.append(keys[is_used])
    if not parts:
        raise DamagedStoreError(f"{stored.path / 'responses'}, which {stored.path / 'pairs'} names, is missing.")
    return pa.concat_tables(parts), np.concatenate(part_keys)


def _make_keys(prompt_ids: pa.StringArray, indices: np.ndarray, codes: Mapping[str, int]) -> np.ndarray:
    """A unique number for each (prompt, response index); negative for prompts that are not in `codes`."""
    encoded = prompt_ids.dictionary_encode()
    numbers = np.array([codes.get(prompt_id, -1) for prompt_id in encoded.dictionary.to_pylist()], np.int64)
    return numbers[encoded.indices.to_numpy()] * _MAX_RESPONSES + indices


def run_lengths(prompt_ids: pa.Array) -> np.ndarray:
    """Lengths of the runs of equal prompt ids."""
    ends = pc.run_end_encode(prompt_ids, pa.int64()).run_ends.to_numpy()
    return np.diff(ends, prepend=0)


def _interleave(table: pa.Table, what: str) -> np.ndarray:
    """Interleave the columns `chosen_<what>` and `rejected_<what>`: shape (2 x pairs,)."""
    return np.stack([table[f"{which}_{what}"].to_numpy() for which in _WHICH], 1).ravel()


def _lengths(column: pa.ListArray) -> np.ndarray:
    return column.value_lengths().to_numpy(zero_copy_only=False)
