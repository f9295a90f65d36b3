"""Ends a run on SIGTERM and Ctrl-C, after the update in progress is saved."""

import os
import signal
from types import FrameType
from typing import Any

import lightning as L

from rlhf_pl.callbacks.round_checkpoint import save_update
from rlhf_pl.checkpointing.progress import is_at_round_end
from rlhf_pl.checkpointing.stop_request import StopRequest, clear_stop_request, get_stop_request


class StopOnSignal(L.Callback):
    """On SIGTERM and on Ctrl-C, saves with `RoundCheckpoint` and ends the run with a message (`RunStopped`).

    In training, the update in progress is finished first; the preparation of a round stops at once. A second Ctrl-C
    does not wait. The command line adds this callback to every run. In your own Trainer it handles both signals of the
    process until the run ends; without it Lightning handles them. SLURM's signal to requeue a job is always handled by
    Lightning.
    """

    def __init__(self) -> None:
        self._request: StopRequest | None = None
        self._handlers: dict[int, Any] = {}
        self._owner = os.getpid()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Become the last callback, so that the others have finished when this one ends the run."""
        others = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
        trainer.callbacks = [*others, self]  # type: ignore[attr-defined]
        self._request = get_stop_request(trainer)

    def listen(self, trainer: L.Trainer) -> None:
        """Install the signal handlers; not in `on_fit_start`, because Lightning installs its own after it."""
        if self._handlers or self._request is None:
            return
        self._owner, self._request.saved_at = os.getpid(), trainer.global_step
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._handlers[number] = signal.signal(number, self._on_signal)
            except ValueError:  # not the main thread
                return

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a dataloader's worker, which inherited this handler: its parent ends it
            return
        assert self._request is not None
        self._request.receive(number)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.listen(trainer)  # for runs without rounds to prepare

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, idx: int) -> None:
        request = get_stop_request(trainer)
        request.has_trained, request.can_stop = True, False  # a stop has to wait for the end of an update

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        request, last = get_stop_request(trainer), is_at_round_end(trainer)
        if (batch_idx + 1) % trainer.accumulate_grad_batches and not last:
            return  # inside an update
        if trainer.strategy.reduce_boolean_decision(request.signum is not None, all=False):
            save_update(trainer)
            request.signum = request.signum or signal.SIGTERM  # the signal of another rank
            request.stop()
        request.can_stop = last  # a stop need not wait for validation and evaluation

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._end(trainer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._end(trainer)

    def _end(self, trainer: L.Trainer) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers, self._request = {}, None
        clear_stop_request(trainer)


def listen_for_signals(trainer: L.Trainer) -> None:
    """Install the signal handlers of the run's StopOnSignal, if there is one."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, StopOnSignal):
            callback.listen(trainer)
