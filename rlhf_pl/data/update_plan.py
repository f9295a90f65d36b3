"""Divides the pairs of an epoch into optimizer updates and micro-batches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

RankBatches = list[list[int]]  # indices of pairs; in a micro-batch, a list for each rank


@dataclass(frozen=True)
class UpdatePlan:
    """A plan that uses every pair, or makes a given number of updates.

    Without that number, the last update of an epoch may have fewer pairs than the others.

    Args:
        total_pairs: Pairs in the epoch, summed over all passes.
        batch_size: Pairs per micro-batch and rank.
        accumulate: Micro-batches per update.
        world_size: Number of ranks.
        max_tokens: Maximum tokens of a micro-batch of a rank. If given, an update is divided into as many micro-batches
            as needed, and `batch_size` and `accumulate` only determine its number of pairs. A longer pair, or part of a
            prompt group, is a micro-batch of its own, over the limit.
        passes: Number of times that an epoch uses each pair; an update has no pair twice.
        fixed_updates: Number of updates of the epoch, whatever its number of pairs; None for as many as the passes
            have. When a pass ends, the next one begins in the same update; the last one may end before all pairs are
            used again, and with few updates some pairs may not be used at all.
    """

    total_pairs: int
    batch_size: int
    accumulate: int = 1
    world_size: int = 1
    max_tokens: int | None = None
    passes: int = 1
    fixed_updates: int | None = None

    @property
    def repeats(self) -> bool:
        """Whether the epoch may use a pair several times."""
        return self.passes > 1 or self.fixed_updates is not None

    @property
    def pairs(self) -> int:
        """Number of distinct pairs."""
        return self.total_pairs // self.passes

    @property
    def pairs_per_update(self) -> int:
        """Number of pairs of an update. Where pairs repeat, at most the pairs of one pass."""
        configured = self.batch_size * self.accumulate * self.world_size
        return min(configured, self.pairs) if self.repeats and self.pairs else configured

    @property
    def updates(self) -> int:
        """Number of updates of the epoch."""
        return -(-self.used_pairs // self.pairs_per_update)

    @property
    def used_pairs(self) -> int:
        """Number of pairs of all updates, repeated ones included."""
        if self.fixed_updates is None or not self.pairs:
            return self.total_pairs
        return self.fixed_updates * self.pairs_per_update

    def divide(
        self, order: Sequence[int], lengths: Sequence[int] | None, split: Mapping[int, Sequence[int]] | None = None
    ) -> list[list[RankBatches]]:
        """Indices of the pairs of each update, micro-batch and rank; the list of a rank may be empty.

        Args:
            order: Indices of the pairs in training order.
            lengths: Number of tokens of each pair. If given, the pairs of a micro-batch are of similar length.
            split: The parts of each pair (or prompt group) that is split, with indices and lengths of their own; they
                take its place in its update.
        """
        starts = range(0, len(order), self.pairs_per_update)
        updates = [list(order[start : start + self.pairs_per_update]) for start in starts]
        if split:
            updates = [[part for pair in update for part in split.get(pair, (pair,))] for update in updates]
        if lengths is not None:
            updates = [sorted(update, key=lengths.__getitem__) for update in updates]
        if self.max_tokens is None or lengths is None:
            width = self.batch_size * self.world_size
            parts = [[update[i : i + width] for i in range(0, len(update), width)] for update in updates]
            return [[[part[rank :: self.world_size] for rank in range(self.world_size)] for part in p] for p in parts]
        counts = [-(-len(fill_greedily(update, lengths, self.max_tokens)) // self.world_size) for update in updates]
        if updates:  # Lightning counts micro-batches, so all updates but the last must have the same number
            counts = [max(counts)] * (len(counts) - 1) + counts[-1:]
        return [
            _balance(update, lengths, self.world_size, count) for update, count in zip(updates, counts, strict=True)
        ]


def _balance(update: list[int], lengths: Sequence[int], world_size: int, micro_batches: int) -> list[RankBatches]:
    """Divide an update into micro-batches for each rank; the longest one is as short as possible."""
    count = micro_batches * world_size
    low, high = max(lengths[i] for i in update), sum(lengths[i] for i in update)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(fill_greedily(update, lengths, middle)) <= count else (middle + 1, high)
    batches = fill_greedily(update, lengths, low)
    batches += [[] for _ in range(count - len(batches))]
    return [batches[i : i + world_size] for i in range(0, count, world_size)]


def fill_greedily(update: Sequence[int], lengths: Sequence[int], capacity: int) -> RankBatches:
    """Divide an update into consecutive batches of at most `capacity` tokens; a longer pair is a batch of its own.

    Args:
        update: Indices of pairs, prompt groups or responses.
        lengths: Number of tokens of each.
        capacity: The limit.
    """
    batches: RankBatches = []
    room = 0
    for pair in update:
        if not batches or lengths[pair] > room:
            batches.append([])
            room = capacity
        batches[-1].append(pair)
        room -= lengths[pair]
    return batches
