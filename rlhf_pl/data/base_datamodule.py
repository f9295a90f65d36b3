"""What the DataModules of pairs share: how an epoch divides into updates, by pairs or by tokens."""

from abc import abstractmethod
from collections.abc import Sequence

import lightning as L

from rlhf_pl.data.pair_batches import RoundBatches
from rlhf_pl.data.update_plan import UpdatePlan


class PairsDataModule(L.LightningDataModule):
    """Data of pairs whose updates are of `batch_size` x `accumulate_grad_batches` x devices of them.

    Args:
        batch_size: Pairs per micro-batch and device.
        max_tokens_per_batch: Where given, an update has the same pairs, divided into as many micro-batches as it takes
            for each to stay within so many tokens (a single longer pair aside).
    """

    def __init__(self, batch_size: int, max_tokens_per_batch: int | None) -> None:
        super().__init__()
        self.batch_size, self.max_tokens_per_batch = batch_size, max_tokens_per_batch
        self._accumulate: int | None = None

    @property
    def _trainer(self) -> L.Trainer:
        if self.trainer is None:
            name = type(self).__name__
            raise RuntimeError(f"{name} works inside a Trainer: trainer.fit(module, datamodule=this).")
        return self.trainer

    def pairs_per_update(self, trainer: L.Trainer) -> int:
        """Pairs that an update sees."""
        if self._accumulate is None:  # as configured: `_divide` changes the Trainer's
            self._accumulate = trainer.accumulate_grad_batches
        return self.batch_size * self._accumulate * trainer.num_devices * trainer.num_nodes

    @abstractmethod
    def divide(self, epoch: int) -> RoundBatches:
        """An epoch as updates and micro-batches; the Trainer accumulates over as many from here on."""

    def _divide(self, order: str, pairs: int, lengths: Sequence[int] | None, passes: int = 1) -> RoundBatches:
        trainer, world_size = self._trainer, self._trainer.world_size
        accumulate = self.pairs_per_update(trainer) // self.batch_size // world_size
        plan = UpdatePlan(passes * pairs, self.batch_size, accumulate, world_size, self.max_tokens_per_batch, passes)
        batches = RoundBatches(plan, order, trainer.global_rank, lengths)
        trainer.accumulate_grad_batches = batches.accumulate
        return batches

    def _held_out_batches(self, pairs: int, lengths: Sequence[int] | None = None) -> RoundBatches:
        """Held-out pairs in micro-batches, in an order of their own."""
        plan = UpdatePlan(pairs, self.batch_size, 1, self._trainer.world_size)
        return RoundBatches(plan, "held-out", self._trainer.global_rank, lengths)
