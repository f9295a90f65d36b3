"""Run trials, several at a time, and append a JSON line of each to a file.

python -m benchmarks.defaults --out trials.jsonl --task short --lr 2e-5 --lr 4e-5 --selector AllPairs --seed 1
python -m benchmarks.defaults --out trials.jsonl --trials trials.json --workers 8   # a list of settings
"""

import argparse
import itertools
import json
import multiprocessing
from pathlib import Path

from benchmarks.common import MODEL
from benchmarks.defaults.tasks import TASKS
from benchmarks.defaults.trial import run_settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--trials", type=Path, help="a JSON list of settings, instead of the options below")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--model", default=str(MODEL))
    for name, kind, default in (
        ("task", str, list(TASKS)),
        ("lr", float, ["auto"]),
        ("selector", str, ["BestWorst"]),
        ("spread", float, [2.0]),
        ("seed", int, [1]),
        ("precision", str, ["bf16-mixed"]),
    ):
        parser.add_argument(f"--{name}", type=kind, action="append", help=f"default {default}")
        parser.set_defaults(**{name: None})
    args = parser.parse_args()
    axes = {
        "task": args.task or list(TASKS),
        "lr": args.lr or ["auto"],
        "selector": args.selector or ["BestWorst"],
        "spread": args.spread or [2.0],
        "seed": args.seed or [1],
        "precision": args.precision or ["bf16-mixed"],
    }
    settings = [
        {"model": args.model, **dict(zip(axes, values, strict=True))} for values in itertools.product(*axes.values())
    ]
    if args.trials is not None:
        settings = json.loads(args.trials.read_text())
    context = multiprocessing.get_context("spawn")
    with context.Pool(args.workers) as pool, args.out.open("a") as file:
        for result in pool.imap_unordered(run_settings, settings):
            file.write(json.dumps(result) + "\n")
            file.flush()
            line = {k: v for k, v in result.items() if k != "samples"}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
