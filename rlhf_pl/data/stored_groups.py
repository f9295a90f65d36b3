"""What a round trains on, read from its store: the responses that are used, in Arrow, and the groups made of them."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from rlhf_pl.algorithms.prompt_groups import PER_TOKEN, SUMMED
from rlhf_pl.models.packed_batch import PrefixGroup
from rlhf_pl.store.round_store import DamagedStoreError, Round

KEY = ("prompt_id", "response_index")
TOKENS = pa.list_(pa.int32())
# of the stage `pairs`: a pair is two indices into the responses of a prompt
PAIRS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("chosen_index", pa.int32()),
        ("rejected_index", pa.int32()),
        ("chosen_reward", pa.float64()),
        ("rejected_reward", pa.float64()),
    ]
)
# of the same stage where whole groups are trained on
GROUPS = pa.schema([("prompt_id", pa.string()), ("response_index", pa.int32()), ("reward", pa.float64())])
_WHICH = ("chosen", "rejected")
_SPAN = 1 << 31  # no response index is as large

Numbers = Mapping[str, Tensor | pa.ListArray]  # (R,) float32; or a list of M float32 in all, per response


@dataclass(frozen=True)
class StoredGroups:
    """R responses that a round trains on, and the groups made of them: of pairs a group is (chosen, rejected).

    Args:
        prompt_ids: Of each response, length R.
        indices: Its number among the responses of its prompt, shape (R,), int32.
        prompt_tokens: Length R.
        response_tokens: Length R.
        finished: Shape (R,), bool.
        rewards: Shaped, shape (R,), float64, reward units.
        sizes: Responses of each group, shape (G,), int64.
        members: The responses of the groups, group by group, by their place among the R; int64.
        pairs: Whether the groups are pairs.
    """

    prompt_ids: pa.Array
    indices: np.ndarray
    prompt_tokens: pa.ListArray
    response_tokens: pa.ListArray
    finished: np.ndarray
    rewards: np.ndarray
    sizes: np.ndarray
    members: np.ndarray
    pairs: bool

    def __post_init__(self) -> None:
        object.__setattr__(self, "_starts", np.concatenate([[0], np.cumsum(self.sizes)]))

    def __len__(self) -> int:
        return len(self.sizes)

    def rows(self, group: int) -> np.ndarray:
        """Places of a group's responses among the R."""
        starts = self._starts  # type: ignore[attr-defined]
        return self.members[starts[group] : starts[group + 1]]

    def tree(self, group: int) -> PrefixGroup:
        """The tokens of a group: its prompt once, then its responses."""
        rows = self.rows(group)
        prompt = self.prompt_tokens[int(rows[0])].values.to_numpy()
        return PrefixGroup(prompt, tuple(self.response_tokens[int(row)].values.to_numpy() for row in rows))

    def response_lengths(self) -> np.ndarray:
        """Tokens of each response, shape (R,)."""
        return _lengths(self.response_tokens)

    def lengths(self) -> list[int]:
        """Tokens of each group, its prompt counted once."""
        firsts = self.members[self._starts[:-1]]  # type: ignore[attr-defined]
        return (_lengths(self.prompt_tokens)[firsts] + self.sum_per_group(self.response_lengths())).tolist()

    def sum_per_group(self, values: np.ndarray) -> np.ndarray:
        """Sums over the responses of each group: (R,) to (G,)."""
        if len(self) == 0:
            return np.zeros(0, values.dtype)
        return np.add.reduceat(values[self.members], self._starts[:-1])  # type: ignore[attr-defined]


def stored_groups(stored: Round) -> StoredGroups:
    """The groups that the stage `pairs` of a round names, with their tokens from the stage `responses`.

    Raises:
        DamagedStoreError: A file is damaged, or a response is not there.
    """
    used = stored.read("pairs")
    if "prompt_tokens" in used.column_names:
        return pair_copies(used)
    pairs = "chosen_index" in used.column_names
    if pairs:
        wanted_ids = pa.array(np.repeat(used["prompt_id"].to_numpy(zero_copy_only=False), 2), pa.string())
        indices, rewards = _both(used, "index").astype(np.int64), _both(used, "reward")
        sizes = np.full(len(used), 2)
    else:
        wanted_ids = used["prompt_id"].combine_chunks()
        indices, rewards = used["response_index"].to_numpy().astype(np.int64), used["reward"].to_numpy()
        sizes = _runs(wanted_ids)
    known = pc.unique(wanted_ids)
    wanted = _keys(wanted_ids, indices, known)
    found = _read_used(stored, known, np.unique(wanted))
    there = _keys(found["prompt_id"], found["response_index"].to_numpy().astype(np.int64), known)
    order = np.argsort(there, kind="stable")
    places = np.searchsorted(there[order], wanted)
    if len(wanted) and (places.max() >= len(there) or (there[order][places] != wanted).any()):
        raise DamagedStoreError(f"{stored.path / 'pairs'} names responses that {stored.path / 'responses'} lacks.")
    members = order[places]
    of_rows = np.zeros(len(there))
    of_rows[members] = rewards
    return StoredGroups(
        found["prompt_id"].combine_chunks(),
        found["response_index"].to_numpy(),
        found["prompt_tokens"].combine_chunks(),
        found["response_tokens"].combine_chunks(),
        found["finished"].to_numpy(),
        of_rows,
        sizes,
        members,
        pairs,
    )


def pair_copies(table: pa.Table) -> StoredGroups:
    """Pairs that were stored with copies of their tokens, as earlier versions did: a response per place in a pair."""
    count = len(table)

    def both(name: str) -> pa.ListArray:
        columns = [table[f"{which}_{name}"].cast(TOKENS) for which in _WHICH]
        chunks = pa.chunked_array([chunk for column in columns for chunk in column.chunks], TOKENS)
        return chunks.combine_chunks().take(pa.array(np.arange(2 * count).reshape(2, -1).T.ravel()))

    noted = "chosen_index" in table.column_names
    twice = pa.array(np.repeat(np.arange(count), 2))
    return StoredGroups(
        table["prompt_id"].combine_chunks().take(twice),
        _both(table, "index").astype(np.int32) if noted else np.tile(np.arange(2, dtype=np.int32), count),
        table["prompt_tokens"].cast(TOKENS).combine_chunks().take(twice),
        both("tokens"),
        np.ones(2 * count, bool),
        _both(table, "reward"),
        np.full(count, 2),
        np.arange(2 * count),
        pairs=True,
    )


def stored_numbers(table: pa.Table, groups: StoredGroups) -> dict[str, Tensor | pa.ListArray]:
    """The log-probs of a round's stage `logps`, by their names in a loss's `needs`.

    Args:
        table: The stage: a row per response; of earlier versions, a row per pair.
        groups: What it was made of.

    Raises:
        ValueError: It is of other responses.
    """
    numbers: dict[str, Tensor | pa.ListArray] = {}
    by_pair = "response_index" not in table.column_names
    if len(table) * (2 if by_pair else 1) != len(groups.indices):
        raise ValueError(f"{len(groups.indices)} responses, but {len(table)} rows of log-probs.")
    for name in SUMMED:
        column = name.removesuffix("s")
        if by_pair and f"chosen_{column}" in table.column_names:
            numbers[name] = torch.tensor(_both(table, column), dtype=torch.float32)
        elif column in table.column_names:
            numbers[name] = torch.tensor(table[column].to_numpy(), dtype=torch.float32)
    for name in PER_TOKEN:
        if name in table.column_names:
            numbers[name] = table[name].combine_chunks()
    return numbers


def _read_used(stored: Round, known: pa.Array, wanted: np.ndarray) -> pa.Table:
    """The responses with these keys, shard by shard, so that the others are never in memory together."""
    columns = [*KEY, "finished", "prompt_tokens", "response_tokens"]
    parts = []
    for table in stored.read_shards("responses", columns):
        keys = _keys(table["prompt_id"], table["response_index"].to_numpy().astype(np.int64), known)
        parts.append(table.filter(pa.array(np.isin(keys, wanted))))
    if not parts:
        raise DamagedStoreError(f"{stored.path / 'responses'}, which {stored.path / 'pairs'} names, is missing.")
    return pa.concat_tables(parts)


def _keys(prompt_ids: pa.ChunkedArray, indices: np.ndarray, known: pa.Array) -> np.ndarray:
    """A number for each (prompt, response index); negative for prompts that are not in `known`."""
    codes = pc.fill_null(pc.index_in(prompt_ids, value_set=known), -1).to_numpy(zero_copy_only=False)
    return codes.astype(np.int64) * _SPAN + indices


def _runs(prompt_ids: pa.Array) -> np.ndarray:
    """Lengths of the runs of equal prompt ids."""
    ends = pc.run_end_encode(prompt_ids, pa.int64()).run_ends.to_numpy()
    return np.diff(ends, prepend=0)


def _both(table: pa.Table, what: str) -> np.ndarray:
    """The columns `chosen_<what>` and `rejected_<what>`, pair by pair: shape (2 x pairs,)."""
    return np.stack([table[f"{which}_{what}"].to_numpy() for which in _WHICH], 1).ravel()


def _lengths(column: pa.ListArray) -> np.ndarray:
    return column.value_lengths().to_numpy(zero_copy_only=False)
