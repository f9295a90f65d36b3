"""How an epoch's pairs divide into optimizer updates and micro-batches."""

from collections.abc import Sequence
from dataclasses import dataclass

Groups = list[list[int]]


@dataclass(frozen=True)
class UpdatePlan:
    """Every pair is used, and every update's gradient is the mean over its pairs, also over those of a short last one.

    Args:
        total_pairs: Pairs in the epoch, those of all passes.
        batch_size: Pairs per micro-batch and rank.
        accumulate: Micro-batches per update.
        world_size: Ranks.
        max_tokens: Where given, an update's pairs are divided by their tokens instead, into as many micro-batches as it
            takes for each to stay within so many; `batch_size` and `accumulate` then only say how many pairs it has.
        passes: Times that every pair comes in the epoch; an update has no pair twice.
    """

    total_pairs: int
    batch_size: int
    accumulate: int = 1
    world_size: int = 1
    max_tokens: int | None = None
    passes: int = 1

    @property
    def pairs(self) -> int:
        """Different pairs."""
        return self.total_pairs // self.passes

    @property
    def pairs_per_update(self) -> int:
        """Where a pass has fewer pairs than an update should have, it is one."""
        wanted = self.batch_size * self.accumulate * self.world_size
        return min(wanted, self.pairs) if self.passes > 1 and self.pairs else wanted

    @property
    def updates(self) -> int:
        return -(-self.total_pairs // self.pairs_per_update)

    def divide(self, order: Sequence[int], lengths: Sequence[int] | None) -> list[list[Groups]]:
        """The pairs of each update, of each micro-batch, of each rank; a rank's part may be empty.

        Args:
            order: Pairs in the order of training.
            lengths: Tokens by pair; where given, the pairs of a micro-batch are of like length.
        """
        starts = range(0, len(order), self.pairs_per_update)
        updates = [list(order[start : start + self.pairs_per_update]) for start in starts]
        if lengths is not None:
            updates = [sorted(update, key=lengths.__getitem__) for update in updates]
        if self.max_tokens is None or lengths is None:
            width = self.batch_size * self.world_size
            parts = [[update[i : i + width] for i in range(0, len(update), width)] for update in updates]
            return [[[part[rank :: self.world_size] for rank in range(self.world_size)] for part in p] for p in parts]
        counts = [-(-len(_fill(update, lengths, self.max_tokens)) // self.world_size) for update in updates]
        if updates:  # all have as many, for Lightning counts; only what comes last may have fewer
            counts = [max(counts)] * (len(counts) - 1) + counts[-1:]
        return [_even(update, lengths, self.world_size, count) for update, count in zip(updates, counts, strict=True)]


def _even(update: list[int], lengths: Sequence[int], world_size: int, micro_batches: int) -> list[Groups]:
    """So many micro-batches for each rank, the longest of them as short as it can be."""
    count = micro_batches * world_size
    low, high = max(lengths[i] for i in update), sum(lengths[i] for i in update)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_fill(update, lengths, middle)) <= count else (middle + 1, high)
    groups = _fill(update, lengths, low)
    groups += [[] for _ in range(count - len(groups))]
    return [groups[i : i + world_size] for i in range(0, count, world_size)]


def _fill(update: list[int], lengths: Sequence[int], capacity: int) -> Groups:
    """Groups of neighbours of at most `capacity` tokens, or of one pair."""
    groups: Groups = []
    room = 0
    for pair in update:
        if not groups or lengths[pair] > room:
            groups.append([])
            room = capacity
        groups[-1].append(pair)
        room -= lengths[pair]
    return groups
