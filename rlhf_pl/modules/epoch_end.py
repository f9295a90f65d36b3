"""Resumes from a checkpoint after an epoch's last update: the epoch's validation and its end hooks still have to run.

Lightning takes such a checkpoint for one of a finished epoch, and skips both.
"""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops.evaluation_loop import RestartStage
from torch import Tensor

from rlhf_pl.checkpointing.progress import is_at_round_end
from rlhf_pl.modules.logging import expose_metrics

_KEY = "rlhf_pl_round_end"


def store_epoch_metrics(trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
    """Write the epoch's metrics, which its end hooks need, into a checkpoint after the epoch's last update."""
    if is_at_round_end(trainer):
        epoch_metrics: Any = trainer.fit_loop.epoch_loop._results.metrics(on_step=False)
        seen = {**trainer.callback_metrics, **epoch_metrics["callback"]}
        checkpoint[_KEY] = {"seen": _scalars(seen), "log": _scalars(epoch_metrics["log"])}


def _scalars(metrics: dict[str, Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in metrics.items() if value.numel() == 1}


def _counts_versions(callback: ModelCheckpoint) -> bool:
    """Whether it writes `-v1` beside an existing file, although the equal names mean equal content."""
    return callback._enable_version_counter and (callback.filename is None or "{step" in callback.filename)


class RoundEnd:
    """Resumes at an epoch's end from a checkpoint after its last update; does nothing for other checkpoints."""

    def __init__(self) -> None:
        self._stored: dict[str, dict[str, float]] = {}  # metrics from the checkpoint
        self._steps: int | None = None  # the loggers' step of the epoch's last update, plus 1
        self._overwriting: list[ModelCheckpoint] = []  # which overwrite files that a killed process has left

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Change a checkpoint in place, before the Trainer's loops read it."""
        self._stored = checkpoint.get(_KEY, {})
        loop = checkpoint["loops"]["fit_loop"]
        epochs, batches = loop["epoch_progress"]["current"], loop["epoch_loop.batch_progress"]
        if batches["is_last_batch"] and epochs["started"] > epochs["processed"]:
            for counts in (batches["total"], batches["current"]):
                counts["completed"] = counts["processed"]  # else Lightning counts the epoch as done

    def begin(self, trainer: L.Trainer) -> None:
        """At the start of training, send the Trainer to the epoch's validation, if one is due, and to its end."""
        if not is_at_round_end(trainer):
            return
        expose_metrics(trainer, self._stored.get("seen", {}))
        loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
        assert fetcher is not None
        self._steps = loop._batches_that_stepped + 1
        everything: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        self._overwriting = [c for c in everything if isinstance(c, ModelCheckpoint) and _counts_versions(c)]
        for callback in self._overwriting:
            callback._enable_version_counter = False
        if loop._should_check_val_fx(fetcher):
            loop.val_loop.batch_progress.reset()
            loop.val_loop._restart_stage = RestartStage.RESTARTED_MID_EVALUATION
        else:
            fetcher.done = True
            loop._batches_that_stepped = self._steps

    def finish(self, trainer: L.Trainer) -> None:
        """After all end hooks of the epoch, do what Lightning leaves out in a restarted epoch."""
        if self._steps is None:
            return
        for logger in trainer.loggers:
            if epoch_metrics := self._stored.get("log"):
                logger.log_metrics(epoch_metrics, step=self._steps - 1)
        for callback in self._overwriting:
            callback._enable_version_counter = True
        trainer.fit_loop._restarting = False  # otherwise it skips the schedules that follow a metric
        self._steps = None
