"""What the LightningModules here share: the hooks of optimizer and schedule."""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import lightning as L
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from rlhf_pl.checkpointing.progress import stopped_inside
from rlhf_pl.checkpointing.safe_loading import guard_loads
from rlhf_pl.data.resumed_counts import adapt_split, note_split
from rlhf_pl.distributed.strategies import clip_gradients
from rlhf_pl.modules.divergence_check import DivergenceCheck
from rlhf_pl.modules.optimization import Optimization


class TrainedModule(L.LightningModule):
    """A module whose `optimization` makes and follows its optimizer and schedule."""

    optimization: Optimization
    train_metrics: ClassVar[tuple[str, ...]] = ()  # logged with every update
    val_metrics: ClassVar[tuple[str, ...]] = ()  # logged with every validation on held-out rows

    gradient_norm: Tensor | None = None  # of the last update, before clipping; None where it is not computed

    def setup(self, stage: str) -> None:
        guard_loads(self.trainer)

    def configure_callbacks(self) -> list[L.Callback]:
        """Also of a run in Python."""
        callbacks: list[L.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        return [] if any(isinstance(callback, DivergenceCheck) for callback in callbacks) else [DivergenceCheck()]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return self.optimization.configure(self)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: int | float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        self.gradient_norm = clip_gradients(self, optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_train_start(self) -> None:
        self.optimization.on_train_start(self.trainer)

    def on_train_epoch_start(self) -> None:
        self.optimization.on_train_epoch_start()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.optimization.on_train_batch_start(self.trainer, batch_idx)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        step = partial(super().optimizer_step, epoch, batch_idx, optimizer, optimizer_closure)
        self.optimization.step(self.trainer, step)

    def lr_scheduler_step(self, scheduler: Any, metric: Any | None) -> None:
        self.optimization.step_schedule(scheduler)

    def on_validation_end(self) -> None:
        self.optimization.validated = not self.trainer.sanity_checking

    def on_train_epoch_end(self) -> None:
        """After what is logged at an epoch's end, and before it is saved."""
        if not stopped_inside(self.trainer):
            self.optimization.step_by_metric(self.trainer, self.val_metrics)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        note_split(self.trainer, checkpoint)
        self.optimization.on_save_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        adapt_split(self.trainer, checkpoint)
        self.optimization.on_load_checkpoint(checkpoint)
