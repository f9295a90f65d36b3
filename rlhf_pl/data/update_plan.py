"""How a round's pairs divide into optimizer updates and micro-batches."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MicroBatch:
    """Positions `start:stop` of the round's order, dealt out to the ranks in turn; its update has `of_update` pairs."""

    start: int
    stop: int
    of_update: int


@dataclass(frozen=True)
class UpdatePlan:
    """Every pair is used, and every update's gradient is the mean over its pairs, also over those of a short last one.

    Lightning divides each micro-batch's loss by `accumulate` and averages over ranks; the weights turn that into the
    mean over the pairs of the update. Ranks may have different numbers of pairs in a micro-batch, but every rank has
    equally many micro-batches.

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
    def pairs_per_update(self) -> int:
        return self.batch_size * self.accumulate * self.world_size

    @property
    def updates(self) -> int:
        return -(-self.total_pairs // self.pairs_per_update)

    @property
    def micro_batches(self) -> list[MicroBatch]:
        width = self.batch_size * self.world_size
        batches = []
        for first in range(0, self.total_pairs, self.pairs_per_update):
            end = min(first + self.pairs_per_update, self.total_pairs)
            for start in range(first, end, width):
                batches.append(MicroBatch(start, min(start + width, end), end - first))
        return batches

    def weight(self, mine: int, micro_batch: MicroBatch) -> float:
        """Factor on the mean loss over a rank's `mine` pairs of a micro-batch."""
        return self.accumulate * self.world_size * mine / micro_batch.of_update
