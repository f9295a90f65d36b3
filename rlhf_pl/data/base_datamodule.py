"""What the DataModules of pairs and groups share: how an epoch divides into updates, by pairs or by tokens."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import lightning as L

from rlhf_pl.data.pair_batches import RoundBatches
from rlhf_pl.data.round_source import RoundSource
from rlhf_pl.data.rows_datamodule import RowsDataModule
from rlhf_pl.data.update_plan import UpdatePlan
from rlhf_pl.utils.errors import at_least


class PairsDataModule(RowsDataModule):
    """Data of pairs whose updates are of `batch_size` x `accumulate_grad_batches` x devices of them.

    Where the loss is not one on pairs, whole prompt groups take their place.

    Args:
        max_tokens_per_batch: Where given, an update has the same pairs, divided into as many micro-batches as it takes
            for each to stay within so many tokens (a single longer pair aside).
        rows: The arguments of `RowsDataModule`; `batch_size` counts pairs.
    """

    def __init__(self, max_tokens_per_batch: int | None, **rows: Any) -> None:
        super().__init__(**rows)
        at_least("data", max_tokens_per_batch=(max_tokens_per_batch, 1))
        self.max_tokens_per_batch = max_tokens_per_batch
        self._accumulate: int | None = None
        self._source: RoundSource | None = None

    def prepare_with(self, source: RoundSource) -> None:
        """Have `source` prepare each round before it is read."""
        self._source = source

    def pairs_per_update(self, trainer: L.Trainer) -> int:
        """Pairs that an update sees."""
        if self._accumulate is None:  # as configured: `accumulate_over` changes the Trainer's
            self._accumulate = trainer.accumulate_grad_batches
        return self.batch_size * self._accumulate * trainer.num_devices * trainer.num_nodes

    @abstractmethod
    def divide(self, epoch: int) -> RoundBatches:
        """An epoch as updates and micro-batches, for `accumulate_over`."""

    def _divide(
        self,
        order: str,
        pairs: int,
        lengths: Sequence[int] | None,
        passes: int = 1,
        counts: Sequence[int] | None = None,
    ) -> RoundBatches:
        trainer, world_size = self._trainer, self._trainer.world_size
        accumulate = self.pairs_per_update(trainer) // self.batch_size // world_size
        plan = UpdatePlan(passes * pairs, self.batch_size, accumulate, world_size, self.max_tokens_per_batch, passes)
        batches = RoundBatches(plan, order, trainer.global_rank, lengths, counts)
        return batches

    def accumulate_over(self, batches: RoundBatches) -> RoundBatches:
        """Have the Trainer accumulate over an update's micro-batches; nothing else sets its accumulation.

        `teardown` gives it back as it was configured.
        """
        self.pairs_per_update(self._trainer)
        self._trainer.accumulate_grad_batches = batches.accumulate
        return batches

    def teardown(self, stage: str) -> None:
        if self._accumulate is not None:
            self._trainer.accumulate_grad_batches, self._accumulate = self._accumulate, None

    def _held_out_batches(self, pairs: int, lengths: Sequence[int] | None = None) -> RoundBatches:
        """Held-out pairs in micro-batches, in an order of their own."""
        plan = UpdatePlan(pairs, self.batch_size, 1, self._trainer.world_size)
        return RoundBatches(plan, "held-out", self._trainer.global_rank, lengths)
