"""A module's optimizer and learning-rate schedule: made, followed, and kept to the config over a resume."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler

from rlhf_pl.data.progress import rounds_done
from rlhf_pl.errors import InputError
from rlhf_pl.fingerprints import describe
from rlhf_pl.optim import WarmupCosine, hyperparameters, restore_hyperparameters
from rlhf_pl.working_copy import WorkingCopy


def check_precision(trainer: L.Trainer) -> None:
    """Refuse the precisions that would cast more than compute.

    Raises:
        InputError: Says which ones to take instead.
    """
    if "true" in str(trainer.precision) and trainer.precision != "32-true":
        raise InputError(
            f"`trainer.precision`: {trainer.precision!r} casts positions and log-probs too, which moves a "
            "sequence's log-prob by nats. For half-precision weights use `--trainer.precision 32-true` with "
            "`--model.dtype bfloat16`; for half-precision compute on float32 weights use `bf16-mixed`."
        )


class Optimization:
    """What a module hands its optimizer hooks to.

    Args:
        optimizer: Makes the optimizer from the parameters.
        lr_scheduler: Makes the schedule from the optimizer; it steps once an update.
    """

    def __init__(self, optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable) -> None:
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self._hyperparameters: list[dict[str, Any]] = []

    def configure(self, module: L.LightningModule) -> OptimizerLRScheduler:
        """For `configure_optimizers`."""
        optimizer, scheduler = self._make([p for p in module.parameters() if p.requires_grad])
        if isinstance(scheduler, WarmupCosine):
            scheduler.follow(lambda: _progress(module.trainer))
        for copy in (c for c in (getattr(m, "copy", None) for m in module.modules()) if isinstance(c, WorkingCopy)):
            optimizer.register_step_post_hook(lambda *_, copy=copy: copy.expire())
        self._hyperparameters = hyperparameters(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _make(self, parameters: list[torch.nn.Parameter]) -> tuple[torch.optim.Optimizer, Any]:
        try:
            optimizer = self.optimizer(parameters)
        except (ValueError, TypeError) as error:
            raise InputError(f"`model.optimizer` can't be made: {error}") from error
        try:
            return optimizer, self.lr_scheduler(optimizer)
        except (ValueError, TypeError) as error:
            raise InputError(f"`model.lr_scheduler` can't be made: {error}") from error

    def settings(self) -> dict[str, Any]:
        """Optimizer and schedule as plain values."""
        optimizer, scheduler = self._make([torch.nn.Parameter(torch.zeros(1))])
        return {
            "optimizer": {"class": type(optimizer).__qualname__, **optimizer.defaults},
            "lr_scheduler": describe(scheduler, "base_lrs", "last_epoch"),
        }

    def on_train_start(self, trainer: L.Trainer) -> None:
        """A checkpoint brings the hyper-parameters it was written with; those of the config count."""
        for optimizer, scheduler in zip(trainer.optimizers, trainer.lr_scheduler_configs, strict=False):
            restore_hyperparameters(optimizer, scheduler.scheduler, self._hyperparameters)

    def on_train_batch_start(self, trainer: L.Trainer, batch_idx: int) -> None:
        """An epoch's first rate: only now is it known how many updates the epoch has."""
        if batch_idx > 0:
            return
        for config in trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, WarmupCosine):
                config.scheduler.refresh()


def _progress(trainer: L.Trainer) -> tuple[float, float]:
    """Middle of the next update's slice, as a share of the run and of its epoch."""
    batches = trainer.num_training_batches
    if batches in (0, float("inf")):  # no loader yet
        return 0.0, 0.0
    batch_progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    updates = -(-int(batches) // trainer.accumulate_grad_batches)
    done = -(-batch_progress.processed // trainer.accumulate_grad_batches)
    finished, done = rounds_done(trainer) + done // updates, done % updates
    of_epoch = (done + 0.5) / updates
    shares = []
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        shares.append((finished + of_epoch) / trainer.max_epochs)
    if trainer.max_steps > 0:
        shares.append((trainer.global_step + 0.5) / trainer.max_steps)
    return max(shares, default=of_epoch), of_epoch
