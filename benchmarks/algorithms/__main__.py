"""Algorithms compared: held-out reward at equal samples, at equal CPU time, and against KL to the start.

All runs of a task start from one model, and sample the same number of responses to the same prompts by the same
settings. Each algorithm is tried with the same learning rates; the one with the highest mean reward over its tuning
runs is used in the final runs, with other seeds.

    python -m benchmarks.algorithms --results algorithms.jsonl
    python -m benchmarks.algorithms --results algorithms.jsonl --plot algorithms.png    # without further runs
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks.algorithms.plots import plot
from benchmarks.algorithms.results import FINAL, TUNING, Results, Run
from benchmarks.algorithms.tables import final_table, tuning_table
from benchmarks.algorithms.tasks import TASKS, Files, Task, prepare
from benchmarks.algorithms.training import train
from benchmarks.algorithms.variants import ALL, VARIANTS
from benchmarks.common import describe_machine, make_parser, run_in_process

FIRST_TUNING_SEED = 101  # the final runs begin at 1


def main() -> None:
    args = parse()
    names = args.task or list(TASKS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = Path(args.results) if args.results else folder / "results.jsonl"
        tasks = [Results(file, task, settings(args, task)) for task in names]
        if not args.plot:
            print(describe_machine(), flush=True)
            for results in tasks:
                (folder / results.name).mkdir()
                compare(args, results, prepare(results.name, folder / results.name))
        for results in tasks:
            print(f"\n{results.name}\n\n{tuning_table(results)}\n\n{final_table(results)}")
        if args.plot:
            drawn = [results for results in tasks if results.finals()]
            if not drawn:
                raise SystemExit(f"--results {args.results} has no final runs of {', '.join(names)} to plot.")
            plot(drawn, args.plot)


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--task", choices=TASKS, action="append", help="default: all")
    parser.add_argument("--algorithm", choices=ALL, action="append", help="default: all that are compared")
    parser.add_argument("--rate", type=float, action="append", help="a learning rate of the grid; default: the task's")
    parser.add_argument("--tuning_seeds", type=int, default=3, help="tuning runs at each learning rate")
    parser.add_argument("--seeds", type=int, default=3, help="final runs, at the best rate")
    parser.add_argument("--rounds", type=int, help="default: the task's")
    parser.add_argument("--results", help="a .jsonl file of finished runs: they are not run again; default: none")
    parser.add_argument("--plot", help="a .png file; only draw the runs of --results")
    return parser.parse_args()


def settings(args: argparse.Namespace, name: str) -> Task:
    task = TASKS[name]
    return replace(task, rates=tuple(args.rate or task.rates), rounds=args.rounds or task.rounds)


def compare(args: argparse.Namespace, results: Results, files: Files) -> None:
    """Make the tuning runs of all algorithms, and then the final runs, as far as they are missing."""
    names = args.algorithm or list(VARIANTS)
    for seed in range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + args.tuning_seeds):
        for name in names:
            for rate in results.task.rates:
                run(results, files, name, TUNING, rate, seed)
    for seed in range(1, args.seeds + 1):
        for name in names:
            best = results.best_rate(name)
            if best is not None:
                run(results, files, name, FINAL, best, seed)


def run(results: Results, files: Files, algorithm: str, phase: str, rate: float, seed: int) -> None:
    if results.has(algorithm, phase, rate, seed):
        return
    try:
        curve = run_in_process(train, results.task, files, algorithm, rate, seed)
        told = f"reward {curve[-1]['reward']:.3f}, KL {curve[-1]['kl']:.2f}, {curve[-1]['seconds']:.1f} CPU s"
    except SystemExit as error:  # the run failed: the last line of its output
        curve, told = [], str(error).strip().splitlines()[-1]
    results.add(Run(results.name, algorithm, rate, seed, phase, curve))
    print(f"{results.name} {algorithm} {phase} {rate:g}, seed {seed}: {told}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
