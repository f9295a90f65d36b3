"""Progress of a Trainer."""

from typing import Any

import lightning as L


def rounds_done(trainer: L.Trainer) -> int:
    """Epochs (rounds) whose training is finished; `current_epoch` is stale while Lightning resumes."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    return progress.processed - has_stopped_inside(trainer)


def is_inside_round(trainer: L.Trainer) -> bool:
    """Whether the training of an epoch (round) has begun but is not finished."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    return progress.started > rounds_done(trainer)


def has_stopped_inside(trainer: L.Trainer) -> bool:
    """Whether the Trainer has left an epoch before its end. Lightning counts such an epoch as done."""
    loop: Any = trainer.fit_loop
    loaders = [] if loop._combined_loader is None else loop._combined_loader.flattened
    trained_on = getattr(loaders[0], "round_index", None) if loaders else None
    if trained_on is None or trained_on != loop.epoch_progress.current.processed - 1:
        return False
    return batches_done(trainer) < loop.max_batches and not loop.epoch_loop.batch_progress.is_last_batch


def is_at_round_end(trainer: L.Trainer) -> bool:
    """Whether all updates of an epoch (round) are done, but not its validation and its end hooks."""
    return is_inside_round(trainer) and trainer.fit_loop.epoch_loop.batch_progress.is_last_batch


def is_stopping_inside(trainer: L.Trainer) -> bool:
    """Whether the Trainer is about to leave an epoch before its end, and validates only for that reason."""
    loop, every = trainer.fit_loop, trainer.val_check_batch
    done = batches_done(trainer)
    is_stopping = trainer.should_stop and loop._can_stop_early and 0 < done < loop.max_batches
    return bool(is_stopping) and not (isinstance(every, int) and done % every == 0)


def batches_done(trainer: L.Trainer) -> int:
    """Micro-batches of the current epoch that this rank has trained on."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return progress.processed
