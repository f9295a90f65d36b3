"""Applies the Trainer's limits, which may end a run before its last epoch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.profilers import PassThroughProfiler, PyTorchProfiler

from rlhf_pl.checkpointing.checkpoints import FOLDER, read_progress
from rlhf_pl.checkpointing.progress import (
    batches_done,
    has_stopped_inside,
    is_at_round_end,
    is_inside_round,
    rounds_done,
)
from rlhf_pl.data.micro_batches import EmptyLoader, MicroBatchSampler
from rlhf_pl.utils.console import console


@dataclass
class Limits:
    """Limits of a run that we apply in place of Lightning.

    Lightning counts an epoch that it stops inside as complete, and with `max_steps` it skips that epoch after a resume.

    Args:
        max_steps: Maximum updates of the run; -1 for no limit.
        batches: Maximum micro-batches of an epoch: a number, or a share as a float.
        trained: Micro-batches of the current epoch that this process has trained on.
        callbacks: All callbacks of the Trainer while some are suspended.
    """

    max_steps: int = -1
    batches: int | float = 1.0
    trained: int = 0
    callbacks: list[L.Callback] | None = None

    def limit(self, total: int) -> int:
        """Maximum micro-batches of an epoch that has `total`."""
        limit = self.batches if isinstance(self.batches, int) else int(total * self.batches)
        return min(total, max(1, limit))


_LIMITS: WeakKeyDictionary[L.Trainer, Limits] = WeakKeyDictionary()


def get_limits(trainer: L.Trainer) -> Limits:
    """The limits that `take_over_limits` took from a Trainer; without it, no limits."""
    return _LIMITS.get(trainer, Limits())


def take_over_limits(trainer: L.Trainer) -> None:
    """Take over `max_steps` and `limit_train_batches` from a Trainer, until `restore_limits`."""
    if trainer in _LIMITS:
        return
    loop: Any = trainer.fit_loop.epoch_loop
    _LIMITS[trainer] = Limits(loop.max_steps, trainer.limit_train_batches)
    loop.max_steps, trainer.limit_train_batches = -1, 1.0


def restore_limits(trainer: L.Trainer) -> None:
    """Restore the limits and callbacks of the Trainer at the end of a run."""
    restore_monitors(trainer)
    limits = _LIMITS.pop(trainer, None)
    if limits is not None:
        trainer.fit_loop.epoch_loop.max_steps = limits.max_steps
        trainer.limit_train_batches = limits.batches


def limit_epoch(trainer: L.Trainer, batches: MicroBatchSampler) -> MicroBatchSampler:
    """Limit an epoch over fixed data to `limit_train_batches`; the next epoch is shuffled differently."""
    limits = get_limits(trainer)
    if limits.batches != 1.0 or isinstance(limits.batches, int):
        batches.limit = limits.limit(len(batches.steps()))
    return batches


def had_reached_max_steps(trainer: L.Trainer) -> bool:
    """Whether the run, before it was started again, had ended at `max_steps`."""
    if trainer.ckpt_path is None:
        return False
    progress = read_progress(Path(trainer.ckpt_path))
    return (
        progress is not None and progress.has_ended_round and 0 <= get_limits(trainer).max_steps <= progress.global_step
    )


def at_max_steps(trainer: L.Trainer) -> bool:
    """Whether the run has reached `max_steps`."""
    return 0 <= get_limits(trainer).max_steps <= trainer.global_step


def is_run_over(trainer: L.Trainer) -> bool:
    """Whether nothing is left to train; called before the next epoch's loader is made."""
    rounds = trainer.max_epochs
    if at_max_steps(trainer) and not is_at_round_end(trainer):
        return True
    if trainer.should_stop and trainer.fit_loop._can_stop_early:
        return True
    return rounds is not None and 0 <= rounds <= rounds_done(trainer)


def make_empty_loader(trainer: L.Trainer) -> EmptyLoader:
    """The loader of a finished run that is started again."""
    run: Any = trainer
    if isinstance(run.profiler, PyTorchProfiler):  # it fails if no step was run
        run.profiler = PassThroughProfiler()
    return EmptyLoader()


def stop_at_max_steps(trainer: L.Trainer) -> None:
    """End the run after the update that reaches `max_steps`, even if `min_steps` or `min_epochs` are higher.

    A run that is resumed at the end of a round first completes that round.
    """
    if at_max_steps(trainer):
        loop: Any = trainer.fit_loop
        loop.min_epochs, loop.epoch_loop.min_steps = None, None
        trainer.should_stop = True


def stop_inside_round(trainer: L.Trainer, batch_idx: int) -> None:
    """End the run after the update that reaches `limit_train_batches`; called after each micro-batch."""
    limits, total = get_limits(trainer), int(trainer.num_training_batches)
    limits.trained += 1
    is_update_complete = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
    if is_update_complete and limits.trained >= limits.limit(total) < total:
        trainer.should_stop = True


def suspend_monitors(trainer: L.Trainer) -> None:
    """Suspend callbacks that monitor a metric, for a run that stops inside an epoch, until `restore_monitors`.

    Their metric is missing, or is that of the previous epoch. They see it in the run that resumes.
    """
    limits, run = get_limits(trainer), trainer
    callbacks: list[L.Callback] = run.callbacks  # type: ignore[attr-defined]
    if limits.callbacks is None:
        limits.callbacks = callbacks
        run.callbacks = [callback for callback in callbacks if not _is_monitor(callback)]  # type: ignore[attr-defined]


def restore_monitors(trainer: L.Trainer) -> None:
    """Restore the callbacks that `suspend_monitors` suspended."""
    limits = get_limits(trainer)
    if limits.callbacks is not None:
        trainer.callbacks = limits.callbacks  # type: ignore[attr-defined]
        limits.callbacks = None


def _is_monitor(callback: L.Callback) -> bool:
    return isinstance(callback, EarlyStopping) or (
        isinstance(callback, ModelCheckpoint) and callback.monitor is not None
    )


def report_stop(trainer: L.Trainer, what: str) -> None:
    """Report at the end of a run that stopped before its last round or epoch why it stopped and how to continue.

    Args:
        trainer: The Trainer of the run.
        what: What an epoch of the run is: `round` or `epoch`.
    """
    complete, rounds = rounds_done(trainer), trainer.max_epochs
    inside = has_stopped_inside(trainer)
    if not trainer.is_global_zero or not (inside or (rounds is not None and complete < rounds)):
        return
    if inside:
        done, total = batches_done(trainer), trainer.num_training_batches
        done -= done % trainer.accumulate_grad_batches
        where = (
            f"inside {what} {complete + 1} at update {trainer.global_step}, after {done} of its {total} micro-batches"
        )
        is_saved = done == 0 or (Path(trainer.default_root_dir) / FOLDER / "last.ckpt").exists()
    else:
        place = f"inside {what} {complete + 1}" if is_inside_round(trainer) else f"after {what} {complete}"
        where, is_saved = f"{place} of {rounds}, at update {trainer.global_step}", True
    if not is_saved:
        then = "No resume point was written."
    elif at_max_steps(trainer):
        then = "`trainer.max_steps` is reached: increase it to continue."
    else:
        then = "The next start continues with the next one."
        then = then if inside else f"A callback or a limit of the Trainer ended the run. {then}"
    console.print(f"Stopped {where}. {then}", soft_wrap=True)
