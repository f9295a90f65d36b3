"""How far a Trainer has come, and the seed it runs with."""

import os
from typing import Any

import lightning as L


def rounds_done(trainer: L.Trainer) -> int:
    """Epochs (rounds) whose training is finished; `current_epoch` is stale while Lightning resumes."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    return progress.processed


def run_seed() -> int:
    """The run's `seed_everything`; 0 where Lightning was given none."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))
