"""Progress bars of loading, training and validation, in the style of the other phases."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.progress import Progress, TaskID

from rlhf_pl.utils.console import make_progress


class RoundProgress(ProgressBar):
    """Progress bars of loading, of each round's training and of validation on pairs; replaces Lightning's own."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def _open(self, description: str, total: int | float, unit: str = "batches") -> None:
        if self._enabled and total:
            self._progress = make_progress()
            self._task = self._progress.add_task(description, total=int(total), unit=unit, note="")
            self._progress.start()

    def _advance(self, done: int, note: str) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, note=note)

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._progress, self._task = None, None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if not trainer.is_global_zero:
            self.disable()
        self._open("loading the model", 1, "")  # Lightning does it next

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._advance(1, "")
        self._close()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._open("training", self.total_train_batches)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._progress is None:  # the run was resumed in the middle of a round
            self._open("training", self.total_train_batches)
        loss = trainer.callback_metrics.get("train/loss")
        self._advance(batch_idx + 1, "" if loss is None else f"loss {float(loss):.3f}")
        if batch_idx + 1 == self.total_train_batches:
            self._close()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close()
        self._open("validating", sum(trainer.num_val_batches))

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._advance(batch_idx + 1, "")
        if batch_idx + 1 == sum(trainer.num_val_batches):
            self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._close()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._close()
