"""Checkpoints to resume from: every N updates, after every round, and when the process is told to stop."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from rlhf_pl.checkpointing.checkpoints import (
    FOLDER,
    RUN,
    AtomicCheckpointIO,
    checkpoint_files,
    link_last,
    remove_checkpoint,
    save_sharded,
)
from rlhf_pl.checkpointing.progress import at_rounds_end, batches_done, rounds_done, stopped_inside
from rlhf_pl.distributed.ranks import ranks_of
from rlhf_pl.distributed.strategies import writes_sharded
from rlhf_pl.modules.epoch_end import RoundEnd, note_metrics
from rlhf_pl.store.round_store import RoundStore
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.secrets import redacted


class RunStopped(BaseException):
    """The process was told to stop, and everything worth keeping is on disk. Not an Exception: nobody may swallow it.

    Args:
        signum: The signal.
        message: What was saved, and how to go on.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


class RoundCheckpoint(Checkpoint):
    """Keeps the run's resume points in `checkpoints/`, written atomically; `last.ckpt` points to the newest.

    A round is saved after its last update, and again when its validation, its evaluation and what other callbacks do at
    its end are done, which a run that goes on from the first does again.

    On SIGTERM (preemption, the end of a SLURM job) and on Ctrl-C the update in progress is finished, a checkpoint is
    written and the run ends with a message; while a round is prepared there is nothing to finish. A second Ctrl-C ends
    it at once. To keep the best by a metric as well, add Lightning's ModelCheckpoint to `trainer.callbacks`.

    Args:
        every_n_updates: A checkpoint after every so many updates, which replaces the one before; 0 for none.
        keep_rounds: Newest checkpoints from after a round that stay; -1 for all. With at least 2 the last round can
            be trained again from its start.
    """

    def __init__(self, every_n_updates: int = 100, keep_rounds: int = 2) -> None:
        if every_n_updates < 0:
            raise InputError(f"`checkpoint.every_n_updates` must be 0 (never) or more, got {every_n_updates}.")
        if keep_rounds != -1 and keep_rounds < 1:
            raise InputError(f"`checkpoint.keep_rounds` must be -1 (all), or 1 or more, got {keep_rounds}.")
        self.every_n_updates = every_n_updates
        self.keep_rounds = keep_rounds
        self._trainer: L.Trainer | None = None
        self._saved_at = 0
        self._requested: int | None = None
        self._at_once = True
        self._handlers: dict[int, Any] = {}
        self._owner = os.getpid()
        self._end = RoundEnd()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        others = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
        trainer.callbacks = [*others, self]  # type: ignore[attr-defined]  # what is saved holds the others' states
        if stage == "fit" and type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._trainer = trainer
        for leftover in (Path(trainer.default_root_dir) / FOLDER).glob(".*.tmp"):
            if trainer.is_global_zero:
                remove_checkpoint(leftover)

    def listen(self) -> None:
        """Take over SIGTERM and Ctrl-C. Lightning sets its own handlers after `on_fit_start`, so not there."""
        if self._handlers or self._trainer is None:
            return
        self._owner, self._saved_at = os.getpid(), self._trainer.global_step
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._handlers[number] = signal.signal(number, self._on_signal)
            except ValueError:  # not the main thread
                return

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a loader's worker, which inherited this handler: its parent ends it
            return
        again = self._requested == number == signal.SIGINT
        self._requested = number
        if self._at_once or again:
            self._stop()

    def _stop(self) -> None:
        assert self._trainer is not None
        assert self._requested is not None
        name = signal.Signals(self._requested).name
        last = Path(self._trainer.default_root_dir) / FOLDER / "last.ckpt"
        if last.exists():
            saved = f"The training up to update {self._saved_at} is in {last.resolve()}"
        else:
            saved = f"Nothing was trained yet; what was generated is in {self._trainer.default_root_dir}"
        raise RunStopped(self._requested, f"Stopped by {name}. {saved}. The same command goes on from there.")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.listen()  # for runs that prepare no rounds
        self._end.begin(trainer)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, idx: int) -> None:
        self._at_once = False  # from here on a stop has to wait for the end of an update

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        last = at_rounds_end(trainer)
        if (batch_idx + 1) % trainer.accumulate_grad_batches and not last:
            return  # inside an update
        wanted = trainer.strategy.reduce_boolean_decision(self._requested is not None, all=False)
        stepped = trainer.global_step > self._saved_at  # a gradient scaler leaves steps out
        due = self.every_n_updates > 0 and stepped and trainer.global_step % self.every_n_updates == 0
        if wanted or due or last:
            self._save(trainer, f"update-{trainer.global_step:08d}.ckpt")
        if wanted:
            self._requested = self._requested or signal.SIGTERM
            self._stop()
        self._at_once = last  # validation and evaluation have nothing that a stop would have to wait for

    def save_inside(self, trainer: L.Trainer) -> None:
        """Where the run has stopped inside a round: as it is after the last update."""
        self._at_once = True
        if batches_done(trainer) >= trainer.accumulate_grad_batches:
            self._save(trainer, f"update-{trainer.global_step:08d}.ckpt")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """After all other callbacks: only now is the round done, and its last update's checkpoint is not needed."""
        self._end.finish(trainer)
        if not stopped_inside(trainer):
            self._save(trainer, f"after-round-{rounds_done(trainer):04d}.ckpt")

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note the run and the metrics of the round's end, and leave secrets out of modules' hyper-parameters."""
        checkpoint[RUN] = RoundStore(trainer.default_root_dir).noted_run
        note_metrics(trainer, checkpoint)
        for name in ("hyper_parameters", "datamodule_hyper_parameters"):
            if name in checkpoint:
                checkpoint[name] = redacted(checkpoint[name])

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._end.load(checkpoint)

    def _save(self, trainer: L.Trainer, name: str) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        at_once, self._at_once = self._at_once, False
        for logger in trainer.loggers:  # what is logged up to here must not be lost: a resumed run won't log it again
            flush: Callable[[], None] | None = getattr(getattr(logger, "experiment", None), "flush", None)
            if callable(flush):
                flush()
            logger.save()
        file = Path(trainer.default_root_dir) / FOLDER / name
        ranks = ranks_of(trainer)
        with ranks.phase("saving a checkpoint"):
            if writes_sharded(trainer):
                save_sharded(trainer, file, ranks)
            else:
                trainer.save_checkpoint(file)
        self._saved_at = trainer.global_step
        if trainer.is_global_zero:
            link_last(file)
            self._remove_old(file)
        ranks.barrier()
        self._at_once = at_once
        if at_once and self._requested is not None:
            self._stop()

    def _remove_old(self, newest: Path) -> None:
        files = [f for f in checkpoint_files(newest.parent.parent) if f != newest]
        rounds = sorted(f for f in [*files, newest] if f.name.startswith("after-round-"))
        keep = rounds if self.keep_rounds == -1 else rounds[-self.keep_rounds :]
        for file in files:
            if file not in keep:
                remove_checkpoint(file)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What a process that was killed before it could remove it has left."""
        last = Path(trainer.default_root_dir) / FOLDER / "last.ckpt"
        if trainer.is_global_zero and last.exists():
            self._remove_old(last.resolve())

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._restore_handlers()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}


def save_resume_point(trainer: L.Trainer) -> None:
    """Have the run's RoundCheckpoint, if there is one, save where a round or epoch was left."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, RoundCheckpoint):
            callback.save_inside(trainer)
