"""Base class of the DataModules of pairs and prompt groups: it divides an epoch into updates, by pairs or by tokens."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import lightning as L

from rlhf_pl.data.base_datamodule import RowsDataModule
from rlhf_pl.data.micro_batches import MicroBatchSampler
from rlhf_pl.data.round_source import RoundSource
from rlhf_pl.data.update_plan import UpdatePlan
from rlhf_pl.utils.errors import check_at_least


class PairsDataModule(RowsDataModule):
    """Pairs, in updates of `batch_size` x `accumulate_grad_batches` x devices pairs.

    For a loss on prompt groups, read "prompt group" for "pair".

    Args:
        max_tokens_per_batch: Maximum tokens of a micro-batch; only a single pair may be longer. An update keeps its
            pairs and is divided into as many micro-batches as needed. None for `batch_size` pairs per micro-batch.
        rows: The arguments of `RowsDataModule`; `batch_size` counts pairs.
    """

    def __init__(self, max_tokens_per_batch: int | None, **rows: Any) -> None:
        super().__init__(**rows)
        check_at_least("data", max_tokens_per_batch=(max_tokens_per_batch, 1))
        self.max_tokens_per_batch = max_tokens_per_batch
        self._accumulate: int | None = None
        self._source: RoundSource | None = None

    def prepare_with(self, source: RoundSource) -> None:
        """Use `source` to prepare each round before it is read."""
        self._source = source

    def pairs_per_update(self, trainer: L.Trainer) -> int:
        """Number of pairs in an update."""
        if self._accumulate is None:  # the configured value: `accumulate_over` changes the Trainer's
            self._accumulate = trainer.accumulate_grad_batches
        return self.batch_size * self._accumulate * trainer.num_devices * trainer.num_nodes

    @abstractmethod
    def divide(self, epoch: int) -> MicroBatchSampler:
        """Divide an epoch into updates and micro-batches."""

    def _divide(
        self,
        order: str,
        pairs: int,
        lengths: Sequence[int] | None,
        passes: int = 1,
        sizes: Sequence[Sequence[int] | None] = (None,),
    ) -> MicroBatchSampler:
        trainer, world_size = self._trainer, self._trainer.world_size
        accumulate = self.pairs_per_update(trainer) // self.batch_size // world_size
        plan = UpdatePlan(passes * pairs, self.batch_size, accumulate, world_size, self.max_tokens_per_batch, passes)
        return MicroBatchSampler(plan, order, trainer.global_rank, lengths, sizes)

    def accumulate_over(self, batches: MicroBatchSampler) -> MicroBatchSampler:
        """Set the Trainer's accumulation to the micro-batches of an update. No other code sets it.

        `teardown` restores the configured value.
        """
        self.pairs_per_update(self._trainer)
        self._trainer.accumulate_grad_batches = batches.accumulate
        return batches

    def teardown(self, stage: str) -> None:
        if self._accumulate is not None:
            self._trainer.accumulate_grad_batches, self._accumulate = self._accumulate, None

    def _held_out_batches(self, pairs: int, lengths: Sequence[int] | None = None) -> MicroBatchSampler:
        """Micro-batches of held-out pairs, in an order that all epochs share."""
        plan = UpdatePlan(pairs, self.batch_size, 1, self._trainer.world_size)
        return MicroBatchSampler(plan, "held-out", self._trainer.global_rank, lengths)
