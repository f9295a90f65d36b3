"""How a run goes on from a checkpoint after an epoch's last update: the epoch's validation and end are to come.

Lightning takes such a checkpoint for one of a finished epoch, and passes over both.
"""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops.evaluation_loop import RestartStage
from torch import Tensor

from rlhf_pl.checkpointing.progress import at_rounds_end
from rlhf_pl.modules.logging import keep

_KEY = "rlhf_pl_round_end"


def note_metrics(trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
    """Write into a checkpoint after an epoch's last update what its end would find measured."""
    if at_rounds_end(trainer):
        of_epoch: Any = trainer.fit_loop.epoch_loop._results.metrics(on_step=False)
        seen = {**trainer.callback_metrics, **of_epoch["callback"]}
        checkpoint[_KEY] = {"seen": _numbers(seen), "log": _numbers(of_epoch["log"])}


def _numbers(metrics: dict[str, Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in metrics.items() if value.numel() == 1}


def _counts_versions(callback: ModelCheckpoint) -> bool:
    """Whether a file that is there makes it write another `-v1`, although their names say that they are the same."""
    return callback._enable_version_counter and (callback.filename is None or "{step" in callback.filename)


class RoundEnd:
    """Goes on at the end of an epoch, where a checkpoint was written after its last update; does nothing elsewhere."""

    def __init__(self) -> None:
        self._found: dict[str, dict[str, float]] = {}
        self._steps: int | None = None  # what loggers call the epoch's last update, plus 1
        self._saving: list[ModelCheckpoint] = []  # which overwrite what a process that died has left

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Before the Trainer's loops take over what a checkpoint says; changes it in place."""
        self._found = checkpoint.get(_KEY, {})
        loop = checkpoint["loops"]["fit_loop"]
        epochs, batches = loop["epoch_progress"]["current"], loop["epoch_loop.batch_progress"]
        if batches["is_last_batch"] and epochs["started"] > epochs["processed"]:
            for counts in (batches["total"], batches["current"]):
                counts["completed"] = counts["processed"]  # else Lightning counts the epoch as done

    def begin(self, trainer: L.Trainer) -> None:
        """When training starts: send the Trainer to the validation, if one is due, and to the epoch's end."""
        if not at_rounds_end(trainer):
            return
        keep(trainer, self._found.get("seen", {}))
        loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
        assert fetcher is not None
        self._steps = loop._batches_that_stepped + 1
        everything: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        self._saving = [c for c in everything if isinstance(c, ModelCheckpoint) and _counts_versions(c)]
        for callback in self._saving:
            callback._enable_version_counter = False
        if loop._should_check_val_fx(fetcher):
            loop.val_loop.batch_progress.reset()
            loop.val_loop._restart_stage = RestartStage.RESTARTED_MID_EVALUATION
        else:
            fetcher.done = True
            loop._batches_that_stepped = self._steps

    def finish(self, trainer: L.Trainer) -> None:
        """At the end of the hooks of the epoch's end: what Lightning leaves out in an epoch that it has restarted."""
        if self._steps is None:
            return
        for logger in trainer.loggers:
            if of_epoch := self._found.get("log"):
                logger.log_metrics(of_epoch, step=self._steps - 1)
        for callback in self._saving:
            callback._enable_version_counter = True
        trainer.fit_loop._restarting = False  # else it leaves out the schedules that follow a metric
        self._steps = None
