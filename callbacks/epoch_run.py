"""Lock, resume points and report of runs over fixed data, the counterpart of `RoundRefresh` for runs in rounds."""

from typing import Any

import lightning as L

from rlhf_pl.callbacks.next_steps import done_line
from rlhf_pl.callbacks.round_checkpoint import save_resume_point
from rlhf_pl.callbacks.run_lifecycle import RunLifecycle
from rlhf_pl.checkpointing.progress import has_stopped_inside, rounds_done
from rlhf_pl.data.run_limits import get_limits, stop_at_max_steps, suspend_monitors, take_over_limits
from rlhf_pl.distributed.ranks import ranks_of
from rlhf_pl.modules.monitors import check_monitors
from rlhf_pl.modules.trainer_options import check_trainer
from rlhf_pl.utils.console import console

_FEW_UPDATES = 8  # an epoch with fewer has hardly a schedule, and learns little
_MISSING_HINT = "It comes from held-out rows: set `data.val_conversations`, `data.val_preferences` or `data.val_pairs`."


class EpochRun(RunLifecycle):
    """Locks the run directory, saves a resume point where a run stops, and prints a line an epoch.

    It works with modules that have `describe_epoch` and DataModules that have `describe` and `val_set`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._validated = False  # in this epoch
        self._noted = False  # whether the size of an epoch was looked at

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        ranks_of(trainer)  # from here on a rank learns when another one ends
        self.choose_threads(trainer)
        check_trainer(trainer, in_rounds=False)
        held_out = _data(trainer).val_set
        validates = held_out is not None and len(held_out) > 0 and trainer.limit_val_batches != 0
        check_monitors(trainer, pl_module, validates, (), "" if validates else _MISSING_HINT)
        take_over_limits(trainer)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if trainer.is_global_zero:
            console.print(f"{_data(trainer).describe()}. Run directory: {trainer.default_root_dir}", soft_wrap=True)
        trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validated = False
        self.warn_of_overload(trainer)
        if trainer.is_global_zero and not self._noted:
            self._note_few_updates(trainer)
        self._noted = True

    def _note_few_updates(self, trainer: L.Trainer) -> None:
        """Print which options give more updates, where an epoch has few of them and nothing else limits it."""
        updates = -(-int(trainer.num_training_batches) // trainer.accumulate_grad_batches)
        options = _data(trainer).update_size
        limit = get_limits(trainer).batches
        limited = isinstance(limit, int) or limit != 1.0 or getattr(_data(trainer), "updates_per_round", None)
        if updates < _FEW_UPDATES and options and not limited:
            names = " or ".join(f"`{name}` (now {value})" for name, value in options.items())
            count = "1 update" if updates == 1 else f"{updates} updates"
            console.print(f"Note: an epoch has only {count}. Decrease {names} for more.", soft_wrap=True)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        self._validated = not trainer.sanity_checking

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
        super().on_fit_end(trainer, pl_module)
        if trainer.is_global_zero:
            console.print(done_line(trainer, self), soft_wrap=True)


def _data(trainer: L.Trainer) -> Any:
    return trainer.datamodule  # type: ignore[attr-defined]
