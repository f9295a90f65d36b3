"""How far a Trainer has come, and the seed it runs with."""

import os
from typing import Any

import lightning as L


def rounds_done(trainer: L.Trainer) -> int:
    """Epochs (rounds) whose training is finished; `current_epoch` is stale while Lightning resumes."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    return progress.processed - stopped_inside(trainer)


def inside_round(trainer: L.Trainer) -> bool:
    """Whether the training of an epoch (round) has begun and is not finished."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    return progress.started > rounds_done(trainer)


def stopped_inside(trainer: L.Trainer) -> bool:
    """Whether the Trainer has left an epoch before its end; Lightning counts that as an epoch done."""
    loop: Any = trainer.fit_loop
    loaders = [] if loop._combined_loader is None else loop._combined_loader.flattened
    trained_on = getattr(loaders[0], "round_index", None) if loaders else None
    if trained_on is None or trained_on != loop.epoch_progress.current.processed - 1:
        return False
    return batches_done(trainer) < loop.max_batches and not loop.epoch_loop.batch_progress.is_last_batch


def at_rounds_end(trainer: L.Trainer) -> bool:
    """Whether all updates of an epoch (round) are made, and its validation and its end are not done."""
    return inside_round(trainer) and trainer.fit_loop.epoch_loop.batch_progress.is_last_batch


def leaves_inside(trainer: L.Trainer) -> bool:
    """Whether the Trainer is about to leave an epoch before its end, and validates for that alone."""
    loop, every = trainer.fit_loop, trainer.val_check_batch
    done = batches_done(trainer)
    stops = trainer.should_stop and loop._can_stop_early and 0 < done < loop.max_batches
    return bool(stops) and not (isinstance(every, int) and done % every == 0)


def batches_done(trainer: L.Trainer) -> int:
    """Micro-batches of the present epoch that this rank has trained on."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return progress.processed


def run_seed() -> int:
    """The run's `seed_everything`; 0 where Lightning was given none."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))
