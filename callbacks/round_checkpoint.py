"""Checkpoints to resume from: every N updates, and after every round."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from rlhf_pl.checkpointing.checkpoints import (
    FOLDER,
    RUN,
    AtomicCheckpointIO,
    checkpoint_files,
    is_whole,
    link_last,
    remove_checkpoint,
    save_sharded,
)
from rlhf_pl.checkpointing.progress import batches_done, has_stopped_inside, is_at_round_end, rounds_done
from rlhf_pl.checkpointing.stop_request import get_stop_request
from rlhf_pl.distributed.ranks import ranks_of
from rlhf_pl.distributed.strategies import writes_sharded
from rlhf_pl.modules.epoch_end import RoundEnd, store_epoch_metrics
from rlhf_pl.store.round_store import RoundStore
from rlhf_pl.utils.console import warn
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.secrets import redacted

_AFTER_ROUND = "after-round-"


class RoundCheckpoint(Checkpoint):
    """Keeps the run's resume points in `checkpoints/`, written atomically; `last.ckpt` points to the newest.

    A round is saved after its last update, and again after its validation, its evaluation and the other callbacks at
    its end. A run resumed from the first of the two does all of these again.

    On SIGTERM (preemption, the end of a SLURM job) and on Ctrl-C, runs of the command line finish and save the update
    in progress (`StopOnSignal`). In a Trainer without that callback, Lightning ends the run on SIGTERM after a
    micro-batch, which is saved first. To keep the best checkpoint by a metric as well, add Lightning's ModelCheckpoint
    to `trainer.callbacks`.

    While the run goes on, the resume point before the newest stays, too, so that damage to one file costs a round at
    most. A run's regular end deletes it, once the newest one has been read back.

    Args:
        every_n_updates: Updates between checkpoints, each of which replaces the previous one; 0 for none.
        keep_rounds: Number of the newest end-of-round checkpoints to keep once the run has ended; -1 for all. With at
            least 2 the last round of an ended run can be trained again from its start, with other settings.
    """

    def __init__(self, every_n_updates: int = 100, keep_rounds: int = 1) -> None:
        if every_n_updates < 0:
            raise InputError(f"`checkpoint.every_n_updates` must be 0 (never) or more, got {every_n_updates}.")
        if keep_rounds != -1 and keep_rounds < 1:
            raise InputError(f"`checkpoint.keep_rounds` must be -1 (all), or 1 or more, got {keep_rounds}.")
        self.every_n_updates = every_n_updates
        self.keep_rounds = keep_rounds
        self._saved_at = 0  # updates of the newest checkpoint
        self._saved_batches: int | None = None  # micro-batches of the newest checkpoint that this process has written
        self._end = RoundEnd()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        others = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
        trainer.callbacks = [*others, self]  # type: ignore[attr-defined]  # last, so that it saves the others' states
        if stage == "fit" and type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for leftover in (Path(trainer.default_root_dir) / FOLDER).glob(".*.tmp"):
            if trainer.is_global_zero:
                remove_checkpoint(leftover)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._saved_at = trainer.global_step
        self._end.begin(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        last = is_at_round_end(trainer)
        if (batch_idx + 1) % trainer.accumulate_grad_batches and not last:
            if trainer.received_sigterm and trainer.world_size == 1:  # Lightning ends the run after this micro-batch
                self.save_inside(trainer)
            return
        has_stepped = trainer.global_step > self._saved_at  # a gradient scaler skips steps
        is_due = self.every_n_updates > 0 and has_stepped and trainer.global_step % self.every_n_updates == 0
        if is_due or last or trainer.strategy.reduce_boolean_decision(trainer.received_sigterm, all=False):
            self._save_update(trainer)

    def save_update(self, trainer: L.Trainer) -> None:
        """Save the last update, unless it is saved already."""
        if self._saved_batches != trainer.fit_loop.total_batch_idx:
            self._save_update(trainer)

    def _save_update(self, trainer: L.Trainer) -> None:
        self._save(trainer, f"update-{trainer.global_step:08d}.ckpt")

    def save_inside(self, trainer: L.Trainer) -> None:
        """Save the state after the last update, where the run stops inside a round."""
        if batches_done(trainer) >= trainer.accumulate_grad_batches:
            self._save_update(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the round, after all other callbacks: its last update's checkpoint is no longer needed."""
        self._end.finish(trainer)
        if not has_stopped_inside(trainer):
            self._save(trainer, f"{_AFTER_ROUND}{rounds_done(trainer):04d}.ckpt")

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the run's id and the epoch's metrics, and remove secrets from the modules' hyperparameters."""
        checkpoint[RUN] = RoundStore(trainer.default_root_dir).recorded_run
        store_epoch_metrics(trainer, checkpoint)
        for name in ("hyper_parameters", "datamodule_hyper_parameters"):
            if name in checkpoint:
                checkpoint[name] = redacted(checkpoint[name])

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._end.load(checkpoint)

    def _save(self, trainer: L.Trainer, name: str) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        request = get_stop_request(trainer)
        with request.postpone():  # a signal
            _flush_loggers(trainer)
            file = Path(trainer.default_root_dir) / FOLDER / name
            ranks = ranks_of(trainer)
            with ranks.phase("saving a checkpoint"):
                if writes_sharded(trainer):
                    save_sharded(trainer, file, ranks)
                else:
                    trainer.save_checkpoint(file)
            self._saved_at = request.saved_at = trainer.global_step
            self._saved_batches = trainer.fit_loop.total_batch_idx
            if trainer.is_global_zero:
                link_last(file)
                self._remove_old(file)
            ranks.barrier()

    def _remove_old(self, newest: Path, has_ended: bool = False) -> None:
        """Delete the checkpoints that are no longer needed.

        Args:
            newest: The newest checkpoint, which stays.
            has_ended: Whether the run has ended, so that the checkpoint before the newest is not needed either.
        """
        for file in self._find_old(newest, has_ended):
            remove_checkpoint(file)

    def _find_old(self, newest: Path, has_ended: bool) -> list[Path]:
        files = [f for f in checkpoint_files(newest.parent.parent) if f != newest]
        if self.keep_rounds == -1:
            return [f for f in files if not f.name.startswith(_AFTER_ROUND)]
        rounds = sorted(f for f in [*files, newest] if f.name.startswith(_AFTER_ROUND))
        least = 2 if newest in rounds and not has_ended else 1
        keep = rounds[-max(self.keep_rounds, least) :]
        return [f for f in files if f not in keep]

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Delete the checkpoint before the newest, and old ones that a killed process has left."""
        last = Path(trainer.default_root_dir) / FOLDER / "last.ckpt"
        if not trainer.is_global_zero or not last.exists():
            return
        newest = last.resolve()
        if not self._find_old(newest, has_ended=True):
            return
        if is_whole(newest):
            self._remove_old(newest, has_ended=True)
        else:
            warn(f"{newest} is damaged; the checkpoints before it are kept. Run the same command again.")


def save_update(trainer: L.Trainer) -> None:
    """Save the last update with the run's RoundCheckpoint, if there is one."""
    for callback in _checkpoints(trainer):
        callback.save_update(trainer)


def save_resume_point(trainer: L.Trainer) -> None:
    """Save the position inside a round or epoch with the run's RoundCheckpoint, if there is one."""
    get_stop_request(trainer).can_stop = True  # no update is in progress any more
    for callback in _checkpoints(trainer):
        callback.save_inside(trainer)


def _checkpoints(trainer: L.Trainer) -> Iterator[RoundCheckpoint]:
    everything: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return (callback for callback in everything if isinstance(callback, RoundCheckpoint))


def _flush_loggers(trainer: L.Trainer) -> None:
    """Flush the loggers: a resumed run does not log again what was logged before its checkpoint."""
    for logger in trainer.loggers:
        flush: Callable[[], None] | None = getattr(getattr(logger, "experiment", None), "flush", None)
        if callable(flush):
            flush()
        logger.save()
