"""SIGKILL at random moments of a run, then the same command again.

    python -m tests.soak.kills [--kills 100] [--seed 7] [--rounds_end]

The trial succeeds if every run ends like one that was never killed: the same files, loss curve and weights, to the last
bit, and no temporary files.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from tests.integration.test_kill_matrix import (
    AT_ENDS,
    TRANSFORMERS,
    make_plan,
    random_moments,
    round_end_points,
    run_matrix,
    run_reference,
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument(
        "--rounds_end", action="store_true", help="at every point between a round's last update and its end"
    )
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of every run: with another number of threads sums round differently
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        plan = make_plan(folder, TRANSFORMERS)
        if arguments.rounds_end:
            plan["arguments"] += AT_ENDS
            points = round_end_points(run_reference(folder, plan))
        else:
            points = random_moments(run_reference(folder, plan), arguments.kills, arguments.seed)
        hits = 0
        for first in range(0, len(points), 10):
            part = folder / f"part{first}"
            part.mkdir()
            (part / "reference.trace").symlink_to(folder / "reference.trace")
            chains = [[point] for point in points[first : first + 10]]
            hits += run_matrix(part, plan, chains, folder / "reference")
            print(f"{hits} kills, {hits} identical, {time.monotonic() - started:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
