"""How far a Trainer has come."""

from typing import Any

import lightning as L


def rounds_done(trainer: L.Trainer) -> int:
    """Epochs (rounds) whose training is finished; `current_epoch` is stale while Lightning resumes."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    return progress.processed
