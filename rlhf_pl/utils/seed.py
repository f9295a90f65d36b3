"""The seed of a run."""

import os


def run_seed() -> int:
    """The run's `seed_everything`; 0 if Lightning has no seed."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))
