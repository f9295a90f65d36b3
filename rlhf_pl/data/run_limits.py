"""Where the Trainer's options end a run before its last epoch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.profilers import PassThroughProfiler, PyTorchProfiler

from rlhf_pl.checkpointing.checkpoints import FOLDER
from rlhf_pl.checkpointing.progress import at_rounds_end, batches_done, inside_round, rounds_done, stopped_inside
from rlhf_pl.data.pair_batches import NoBatches, RoundBatches
from rlhf_pl.utils.console import console


@dataclass
class Limits:
    """Limits of a run that we count ourselves.

    Lightning counts an epoch that it leaves as done, and with `max_steps` it passes over the epoch after a resume.

    Args:
        max_steps: Updates of the whole run; -1 for any number.
        batches: Micro-batches of an epoch: their number, or a share as a float.
        trained: Micro-batches of the present epoch that this process has trained on.
        callbacks: All of the Trainer's, while some are set aside.
    """

    max_steps: int = -1
    batches: int | float = 1.0
    trained: int = 0
    callbacks: list[L.Callback] | None = None

    def of(self, total: int) -> int:
        """How many of an epoch's `total` micro-batches are wanted."""
        wanted = self.batches if isinstance(self.batches, int) else int(total * self.batches)
        return min(total, max(1, wanted))


_OF_TRAINERS: WeakKeyDictionary[L.Trainer, Limits] = WeakKeyDictionary()


def limits_of(trainer: L.Trainer) -> Limits:
    """The limits that were taken over from a Trainer; none before."""
    return _OF_TRAINERS.get(trainer, Limits())


def take_limits(trainer: L.Trainer) -> None:
    """Take `max_steps` and `limit_train_batches` over from a Trainer, until `return_limits`."""
    if trainer in _OF_TRAINERS:
        return
    loop: Any = trainer.fit_loop.epoch_loop
    _OF_TRAINERS[trainer] = Limits(loop.max_steps, trainer.limit_train_batches)
    loop.max_steps, trainer.limit_train_batches = -1, 1.0


def return_limits(trainer: L.Trainer) -> None:
    """The run is over: the Trainer is as it was."""
    return_monitors(trainer)
    limits = _OF_TRAINERS.pop(trainer, None)
    if limits is not None:
        trainer.fit_loop.epoch_loop.max_steps = limits.max_steps
        trainer.limit_train_batches = limits.batches


def limit_epoch(trainer: L.Trainer, batches: RoundBatches) -> RoundBatches:
    """An epoch over fixed data, which is as long as `limit_train_batches` says: the next one is shuffled anew."""
    limits = limits_of(trainer)
    if limits.batches != 1.0 or isinstance(limits.batches, int):
        batches.limit = limits.of(len(batches.steps()))
    return batches


def _at_max_steps(trainer: L.Trainer) -> bool:
    return 0 <= limits_of(trainer).max_steps <= trainer.global_step


def is_over(trainer: L.Trainer) -> bool:
    """Whether nothing is left to train, before the next epoch's loader is made."""
    rounds = trainer.max_epochs
    if _at_max_steps(trainer) and not at_rounds_end(trainer):
        return True
    if trainer.should_stop and trainer.fit_loop._can_stop_early:
        return True
    return rounds is not None and 0 <= rounds <= rounds_done(trainer)


def nothing_left(trainer: L.Trainer) -> NoBatches:
    """The loader of a finished run that is started again."""
    run: Any = trainer
    if isinstance(run.profiler, PyTorchProfiler):  # it fails where no step was made
        run.profiler = PassThroughProfiler()
    return NoBatches()


def stop_at_max_steps(trainer: L.Trainer) -> None:
    """After an update: end the run if it was the last one, whatever `min_steps` and `min_epochs` say.

    A run that goes on at a round's end comes to that first.
    """
    if _at_max_steps(trainer):
        loop: Any = trainer.fit_loop
        loop.min_epochs, loop.epoch_loop.min_steps = None, None
        trainer.should_stop = True


def stop_inside_round(trainer: L.Trainer, batch_idx: int) -> None:
    """After a micro-batch: end the run after the update in which `limit_train_batches` is reached."""
    limits, total = limits_of(trainer), int(trainer.num_training_batches)
    limits.trained += 1
    update_ended = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
    if update_ended and limits.trained >= limits.of(total) < total:
        trainer.should_stop = True


def set_monitors_aside(trainer: L.Trainer) -> None:
    """Where a run stops inside an epoch, let callbacks that follow a metric take no notice, until `return_monitors`.

    What they would follow is not there yet, or is of the epoch before; the run that goes on shows it to them.
    """
    limits, run = limits_of(trainer), trainer
    everything: list[L.Callback] = run.callbacks  # type: ignore[attr-defined]
    if limits.callbacks is None:
        limits.callbacks = everything
        run.callbacks = [callback for callback in everything if not _follows(callback)]  # type: ignore[attr-defined]


def return_monitors(trainer: L.Trainer) -> None:
    """Take back `set_monitors_aside`."""
    limits = limits_of(trainer)
    if limits.callbacks is not None:
        trainer.callbacks = limits.callbacks  # type: ignore[attr-defined]
        limits.callbacks = None


def _follows(callback: L.Callback) -> bool:
    return isinstance(callback, EarlyStopping) or (
        isinstance(callback, ModelCheckpoint) and callback.monitor is not None
    )


def report_stop(trainer: L.Trainer, what: str) -> None:
    """Say at the end of a run that it has not come to its last round or epoch, why, and how it goes on."""
    ended, rounds = rounds_done(trainer), trainer.max_epochs
    inside = stopped_inside(trainer)
    if not trainer.is_global_zero or not (inside or (rounds is not None and ended < rounds)):
        return
    if inside:
        done, total = batches_done(trainer), trainer.num_training_batches
        done -= done % trainer.accumulate_grad_batches
        where = f"inside {what} {ended + 1} at update {trainer.global_step}, after {done} of its {total} micro-batches"
        is_saved = done == 0 or (Path(trainer.default_root_dir) / FOLDER / "last.ckpt").exists()
    else:
        place = f"inside {what} {ended + 1}" if inside_round(trainer) else f"after {what} {ended}"
        where, is_saved = f"{place} of {rounds}, at update {trainer.global_step}", True
    if not is_saved:
        then = "No resume point was written."
    elif _at_max_steps(trainer):
        then = "`trainer.max_steps` is reached: raise it to go on."
    else:
        then = "The next start goes on with the next one."
        then = then if inside else f"A callback or a limit of the Trainer ended the run. {then}"
    console.print(f"Stopped {where}. {then}", soft_wrap=True)
