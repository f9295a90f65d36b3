"""Memory of a run over many rounds of a tiny model: prints what is resident after each, and fails if it grows.

    python -m tests.soak.memory [--rounds 40] [--grows_mib 40] [--settling 10]

The first rounds fill caches, so growth counts from round `settling` on: the mean of the last rounds against that of as
many after it.
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
    """MiB that are resident at the start of every round's training, as the run logs them."""
    sampler = ["--rollout.sampler", "TransformersSampler", "--rollout.val_num_responses", "2"]
    listed = command(folder, save_llama(folder / "llama"), rounds, sampler)
    subprocess.run(listed, check=True, stdout=subprocess.DEVNULL)
    return [gib * 1024 for gib in memory_by_round(folder / "run")]


def growth(resident: list[float], settling: int) -> float:
    """MiB, mean against mean of as many rounds: a quarter of those after the first `settling`."""
    settled = resident[settling:]
    count = max(1, len(settled) // 4)
    return mean(settled[-count:]) - mean(settled[:count])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--grows_mib", type=float, default=40.0, help="Growth that is let pass.")
    parser.add_argument("--settling", type=int, default=10, help="Rounds at the beginning that do not count.")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        resident = run(Path(folder), given.rounds)
    for number, size in enumerate(resident, 1):
        print(f"round {number}: {size:.0f} MiB")
    grown = growth(resident, given.settling)
    print(f"from round {given.settling + 1} on: {grown:+.1f} MiB, of {given.grows_mib:g} that are let pass")
    return int(grown > given.grows_mib)


if __name__ == "__main__":
    sys.exit(main())
