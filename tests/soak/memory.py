"""Memory of a run over many rounds of a tiny model: prints the resident memory of each, and fails if it grows.

    python -m tests.soak.memory [--rounds 60] [--grows_mib 40] [--settling 25]

The first rounds fill caches (in bfloat16 those of torch's kernels, docs/scaling.md), so growth is measured after round
`settling`: the mean of the last rounds minus the mean of the first ones.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean

from tests.conftest import save_llama
from tests.integration.test_many_rounds import command, memory_by_round


def run(folder: Path, rounds: int) -> list[float]:
    """Run the rounds; returns the resident memory at the start of every round's training, MiB, from the run's log."""
    sampler = ["--rollout.sampler", "TransformersSampler", "--rollout.val_num_responses", "2"]
    listed = command(folder, save_llama(folder / "llama"), rounds, sampler)
    subprocess.run(listed, check=True, stdout=subprocess.DEVNULL)
    return [gib * 1024 for gib in memory_by_round(folder / "run")]


def measure_growth(resident: list[float], settling: int) -> float:
    """Mean of the last quarter of the rounds after `settling` minus the mean of the first quarter, MiB."""
    settled = resident[settling:]
    count = max(1, len(settled) // 4)
    return mean(settled[-count:]) - mean(settled[:count])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--grows_mib", type=float, default=40.0, help="Growth that is allowed.")
    parser.add_argument("--settling", type=int, default=25, help="First rounds, which do not count.")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        resident = run(Path(folder), given.rounds)
    for number, size in enumerate(resident, 1):
        print(f"round {number}: {size:.0f} MiB")
    grown = measure_growth(resident, given.settling)
    print(f"from round {given.settling + 1} on: {grown:+.1f} MiB of the allowed {given.grows_mib:g}")
    return int(grown > given.grows_mib)


if __name__ == "__main__":
    sys.exit(main())
