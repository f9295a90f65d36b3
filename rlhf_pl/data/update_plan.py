"""How a round's pairs divide into optimizer updates and micro-batches."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MicroBatch:
    """Positions `start:stop` of the round's order, dealt out to the ranks in turn, and the weight of its mean loss."""

    start: int
    stop: int
    weight: float


@dataclass(frozen=True)
class UpdatePlan:
    """Every pair is used, and every update's gradient is the mean over its pairs, also over those of a short last one.

    Lightning divides each micro-batch's loss by `accumulate` and averages over ranks; the weights turn that into the
    mean over the pairs of the update. Only up to `world_size - 1` pairs at the round's end are left out, so that all
    ranks have equally many.

    Args:
        total_pairs: Pairs in the round.
        batch_size: Pairs per micro-batch and rank.
        accumulate: Micro-batches per update.
        world_size: Ranks.
    """

    total_pairs: int
    batch_size: int
    accumulate: int = 1
    world_size: int = 1

    @property
    def pairs(self) -> int:
        """Pairs used."""
        return self.total_pairs - self.total_pairs % self.world_size

    @property
    def pairs_per_update(self) -> int:
        return self.batch_size * self.accumulate * self.world_size

    @property
    def updates(self) -> int:
        return -(-self.pairs // self.pairs_per_update)

    @property
    def micro_batches(self) -> list[MicroBatch]:
        width = self.batch_size * self.world_size
        batches = []
        for first in range(0, self.pairs, self.pairs_per_update):
            end = min(first + self.pairs_per_update, self.pairs)
            for start in range(first, end, width):
                stop = min(start + width, end)
                batches.append(MicroBatch(start, stop, self.accumulate * (stop - start) / (end - first)))
        return batches
