"""Lock, resume points and report of runs over fixed data, the counterpart of `RoundRefresh` for runs in rounds."""

from typing import Any

import lightning as L

from rlhf_pl.callbacks.round_checkpoint import save_resume_point
from rlhf_pl.checkpointing.progress import has_stopped_inside, is_at_round_end, is_stopping_inside, rounds_done
from rlhf_pl.data.run_limits import (
    report_stop,
    restore_limits,
    restore_monitors,
    stop_at_max_steps,
    suspend_monitors,
    take_over_limits,
)
from rlhf_pl.distributed.ranks import forget_ranks, ranks_of, report_failure
from rlhf_pl.modules.monitors import check_monitors
from rlhf_pl.modules.trainer_options import check_trainer
from rlhf_pl.utils.console import console
from rlhf_pl.utils.lock import RunLock

_MISSING_HINT = "It comes from held-out rows: set `data.val_conversations`, `data.val_preferences` or `data.val_pairs`."


class EpochRun(L.Callback):
    """Locks the run directory, saves a resume point where a run stops, and prints a line an epoch.

    It works with modules that have `describe_epoch` and DataModules that have `describe` and `val_set`.
    """

    def __init__(self) -> None:
        self._lock: RunLock | None = None
        self._validated = False  # in this epoch

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        ranks_of(trainer)  # from here on a rank learns when another one ends
        check_trainer(trainer, in_rounds=False)
        held_out = _data(trainer).val_set
        validates = held_out is not None and len(held_out) > 0 and trainer.limit_val_batches != 0
        check_monitors(trainer, pl_module, validates, (), "" if validates else _MISSING_HINT)
        take_over_limits(trainer)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lock the run directory: from here on only this process writes to it."""
        self._lock = RunLock(trainer.default_root_dir)
        ranks_of(trainer).run_on_rank_zero(self._lock.acquire)
        if trainer.is_global_zero:
            console.print(f"{_data(trainer).describe()}. Run directory: {trainer.default_root_dir}", soft_wrap=True)
        trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not is_at_round_end(trainer):
            stop_at_max_steps(trainer)  # a resumed run may have reached them

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validated = False

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if is_stopping_inside(trainer):
            suspend_monitors(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        restore_monitors(trainer)
        self._validated = not trainer.sanity_checking

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stop_at_max_steps(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the epoch's line after its validation, or save a resume point where the run stops inside it."""
        stop_at_max_steps(trainer)
        if has_stopped_inside(trainer):
            save_resume_point(trainer)
            suspend_monitors(trainer)
        elif trainer.is_global_zero:
            console.print(f"epoch {rounds_done(trainer)}: {self._line(trainer, pl_module)}", soft_wrap=True)

    def _line(self, trainer: L.Trainer, module: Any) -> str:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if "val/loss" in metrics and self._validated:  # the Trainer keeps those of earlier epochs
            return module.describe_epoch(metrics, len(_data(trainer).val_set))
        return f"loss {metrics['train/loss']:.3f}" if "train/loss" in metrics else "no updates"

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        report_stop(trainer, "epoch")
        if trainer.is_global_zero:
            run_dir = trainer.default_root_dir
            done = f"Done. The model is in {run_dir}/model; see the curves with tensorboard --logdir {run_dir}"
            console.print(done, soft_wrap=True)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._end()
        restore_limits(trainer)
        forget_ranks(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        report_failure(trainer, exception)
        self._end()
        restore_limits(trainer)

    def _end(self) -> None:
        if self._lock is not None:
            self._lock.release()


def _data(trainer: L.Trainer) -> Any:
    return trainer.datamodule  # type: ignore[attr-defined]
