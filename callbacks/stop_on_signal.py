"""Ends a run on SIGTERM and Ctrl-C once the update in progress is saved."""

import os
import signal
from types import FrameType
from typing import Any

import lightning as L

from rlhf_pl.callbacks.round_checkpoint import save_update
from rlhf_pl.checkpointing.progress import at_rounds_end
from rlhf_pl.checkpointing.stop_request import StopRequest, forget_stop_request, stop_request_of


class StopOnSignal(L.Callback):
    """On SIGTERM and on Ctrl-C, has `RoundCheckpoint` save, and ends the run with a message (`RunStopped`).

    In training, the update in progress is finished first; while a round is prepared there is nothing to finish. A
    second Ctrl-C does not wait. The command line adds it to every run. In a Trainer of yours it takes both signals from
    the process until the run ends; without it they do what Lightning makes of them. SLURM's signal to requeue a job
    stays Lightning's.
    """

    def __init__(self) -> None:
        self._request: StopRequest | None = None
        self._handlers: dict[int, Any] = {}
        self._owner = os.getpid()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go behind all other callbacks: when this one ends the run, they have done their part."""
        others = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
        trainer.callbacks = [*others, self]  # type: ignore[attr-defined]
        self._request = stop_request_of(trainer)

    def listen(self, trainer: L.Trainer) -> None:
        """Take over the signals. Lightning sets its own handlers after `on_fit_start`, so not there."""
        if self._handlers or self._request is None:
            return
        self._owner, self._request.saved_at = os.getpid(), trainer.global_step
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._handlers[number] = signal.signal(number, self._on_signal)
            except ValueError:  # not the main thread
                return

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a loader's worker, which inherited this handler: its parent ends it
            return
        assert self._request is not None
        self._request.receive(number)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.listen(trainer)  # for runs that prepare no rounds

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, idx: int) -> None:
        request = stop_request_of(trainer)
        request.has_trained, request.at_once = True, False  # a stop has to wait for the end of an update

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        request, last = stop_request_of(trainer), at_rounds_end(trainer)
        if (batch_idx + 1) % trainer.accumulate_grad_batches and not last:
            return  # inside an update
        if trainer.strategy.reduce_boolean_decision(request.signum is not None, all=False):
            save_update(trainer)
            request.signum = request.signum or signal.SIGTERM  # which another rank got
            request.carry_out()
        request.at_once = last  # validation and evaluation have nothing that a stop would have to wait for

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._end(trainer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._end(trainer)

    def _end(self, trainer: L.Trainer) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers, self._request = {}, None
        forget_stop_request(trainer)


def listen_for_signals(trainer: L.Trainer) -> None:
    """Have the run's StopOnSignal, if there is one, take over the signals."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, StopOnSignal):
            callback.listen(trainer)
