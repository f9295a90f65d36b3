"""A module's optimizer and learning-rate schedule: made, stepped, and reset to the config after a resume."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.optim.lr_scheduler import ReduceLROnPlateau

from rlhf_pl.checkpointing.progress import rounds_done
from rlhf_pl.data.run_limits import get_limits
from rlhf_pl.distributed.strategies import is_sharded
from rlhf_pl.models.working_copy import working_copies
from rlhf_pl.modules.learning_rates import automatic_rate, is_automatic
from rlhf_pl.modules.optimizers import (
    ProgressSchedule,
    add_empty_state,
    copy_state,
    hyperparameters,
    reset_state,
    restore_hyperparameters,
)
from rlhf_pl.utils.console import console
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.fingerprints import describe

_KEY = "rlhf_pl_skipped"


@dataclass
class Skipped:
    """Optimizer steps that a gradient scaler has skipped because gradients overflowed.

    Args:
        in_run: Their number since the run started.
        in_epoch: Their number since the epoch started.
        last: Whether the last step was skipped.
    """

    in_run: int = 0
    in_epoch: int = 0
    last: bool = False


class Optimization:
    """Optimizer and schedule of a module, which calls it from its hooks.

    Args:
        optimizer: Makes the optimizer from the parameters.
        lr_scheduler: Makes the schedule from the optimizer; it steps once an update.
        suitable_rate: Returns the learning rate that `auto` stands for.
        reset_state: Whether every epoch starts with the optimizer's initial state.
    """

    def __init__(
        self,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable,
        suitable_rate: Callable[[], float],
        reset_state: bool = False,
    ) -> None:
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.suitable_rate, self.reset_state = suitable_rate, reset_state
        self._initial_state: dict[Any, Any] = {}
        self._hyperparameters: list[dict[str, Any]] = []
        self._is_automatic = False  # whether the rate is chosen here
        self.skipped = Skipped()
        self.validated = False  # in this epoch

    def configure(self, module: L.LightningModule, parameters: Sequence[Any]) -> OptimizerLRScheduler:
        """Make optimizer and schedule, for `configure_optimizers`.

        Args:
            module: The module that trains.
            parameters: What trains: parameters, or torch's parameter groups.
        """
        optimizer, scheduler = self._make(list(parameters))
        self._is_automatic = is_automatic(optimizer)
        if isinstance(scheduler, ProgressSchedule):
            scheduler.follow(lambda: _progress(module.trainer, self.skipped))
        for copy in working_copies(module):
            optimizer.register_step_post_hook(lambda *_, copy=copy: copy.invalidate())
        self._hyperparameters = hyperparameters(optimizer)
        if self.reset_state:
            self._initial_state = copy_state(optimizer)
        config: Any = {"scheduler": scheduler, "interval": "step"}
        if isinstance(scheduler, ReduceLROnPlateau):
            config = {"scheduler": scheduler, "interval": "epoch", "monitor": self.monitor, "strict": False}
        return {"optimizer": optimizer, "lr_scheduler": config}

    @property
    def monitor(self) -> str | None:
        """The metric that the schedule follows; None if it follows none.

        Raises:
            InputError: The schedule needs a metric and names none.
        """
        scheduler = self._make([torch.nn.Parameter(torch.zeros(1))])[1]
        if not isinstance(scheduler, ReduceLROnPlateau):
            return None
        monitor = getattr(scheduler, "monitor", None)
        if monitor is None:
            raise InputError(
                "`model.lr_scheduler`: ReduceLROnPlateau needs a metric. Use class_path "
                "lightning.pytorch.cli.ReduceLROnPlateau with init_args {monitor: val/loss}."
            )
        return monitor

    def _make(self, parameters: list[Any]) -> tuple[torch.optim.Optimizer, Any]:
        try:
            with automatic_rate(self.suitable_rate):
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
            **({"optimizer_state": "new in every round"} if self.reset_state else {}),
        }

    def on_fit_start(self, trainer: L.Trainer) -> None:
        """Say which rate `auto` stands for, after the lines of callbacks on the run itself."""
        if self._is_automatic and trainer.is_global_zero:
            console.print(f"Learning rate: {self.suitable_rate():g}, chosen for the model's size (`lr: auto`).")

    def on_train_start(self, trainer: L.Trainer) -> None:
        """Restore the config's hyperparameters, which a checkpoint has replaced."""
        for optimizer, scheduler in zip(trainer.optimizers, trainer.lr_scheduler_configs, strict=False):
            restore_hyperparameters(optimizer, scheduler.scheduler, self._hyperparameters)

    def step(self, trainer: L.Trainer, make_step: Callable[[], None]) -> None:
        """Make an optimizer step. A step that a gradient scaler skips does not count as an update."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        before = 0.0 if scaler is None else scaler.get_scale()
        make_step()
        self.skipped.last = scaler is not None and scaler.get_scale() < before
        if self.skipped.last:
            self.skipped.in_epoch += 1
            self.skipped.in_run += 1
            loop: Any = trainer.fit_loop.epoch_loop
            steps = loop.automatic_optimization.optim_progress.optimizer.step
            for counts in (steps.total, steps.current):  # Lightning adds one to each
                counts.ready -= 1
                counts.completed -= 1
            loop._batches_that_stepped -= 1

    def step_schedule(self, scheduler: Any) -> None:
        """Step a schedule that follows updates, after an update."""
        if not self.skipped.last and not isinstance(scheduler, ReduceLROnPlateau):
            with warnings.catch_warnings():  # a first round without pairs steps the schedule alone
                warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
                scheduler.step()

    def step_by_metric(self, trainer: L.Trainer, val_metrics: Sequence[str]) -> None:
        """Step the schedules that follow a metric, at an epoch's end: before the epoch's checkpoint, unlike Lightning.

        Args:
            trainer: The run's Trainer.
            val_metrics: Metrics that come from validation; without one in this epoch, these have no new values.
        """
        for config in trainer.lr_scheduler_configs:
            name = config.monitor
            if not isinstance(config.scheduler, ReduceLROnPlateau) or name is None:
                continue
            value = trainer.callback_metrics.get(name)
            if value is not None and (self.validated or name not in val_metrics):
                config.scheduler.step(value)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the numbers of skipped steps."""
        checkpoint[_KEY] = {"in_run": self.skipped.in_run, "in_epoch": self.skipped.in_epoch}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the numbers of skipped steps."""
        self.skipped = Skipped(**checkpoint.get(_KEY, {}))

    def on_train_epoch_start(self, trainer: L.Trainer) -> None:
        """Begin an epoch; Lightning leaves this out where a run resumes inside of one."""
        if self.reset_state:
            for optimizer in trainer.optimizers:
                reset_state(optimizer, self._initial_state)
                if is_sharded(trainer):
                    parameters = [p for group in optimizer.param_groups for p in group["params"]]
                    add_empty_state(optimizer, parameters)
        self.skipped.in_epoch, self.validated = 0, False

    def on_train_batch_start(self, trainer: L.Trainer, batch_idx: int) -> None:
        """Set an epoch's first rate: the number of its updates is known only now."""
        if batch_idx > 0:
            return
        for config in trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, ProgressSchedule):
                config.scheduler.refresh()


def _progress(trainer: L.Trainer, skipped: Skipped) -> tuple[float, float]:
    """Middle of the next update's slice, as a share of the run and of its epoch.

    The run has `max_epochs` epochs, or `max_steps` updates where `max_epochs` is not set. A run that stops earlier has
    the schedule of the whole run.
    """
    batches = trainer.num_training_batches
    if batches in (0, float("inf")):  # no dataloader yet
        return 0.0, 0.0
    batch_progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    updates = -(-int(batches) // trainer.accumulate_grad_batches)
    done = -(-batch_progress.processed // trainer.accumulate_grad_batches)
    finished, done = rounds_done(trainer) + done // updates, done % updates
    in_epoch = (max(0, done - skipped.in_epoch) + 0.5) / updates
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        return (finished + (done - skipped.in_run + 0.5) / updates) / trainer.max_epochs, in_epoch
    max_steps = get_limits(trainer).max_steps
    return ((trainer.global_step + 0.5) / max_steps if max_steps > 0 else in_epoch), in_epoch
