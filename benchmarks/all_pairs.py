"""Held-out reward at equal samples and at equal time: REBEL on all pairs of a prompt, and on best against worst.

All runs start from one model and sample the same number of responses. A round's time is that of sampling, scoring,
log-probs and training, from its manifest. Tasks: `toy` (benchmarks/toy_task.py), and `quickstart`, on SmolLM2-135M.

    python -m benchmarks.all_pairs --plot all_pairs.png
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import describe_machine, format_table, make_parser
from benchmarks.toy_task import TOKENS, save_prompts, save_toy_model

Point = tuple[int, float, float]  # responses sampled, seconds of the rounds, held-out reward
ROOT = Path(__file__).parents[1]
SETTINGS = {
    "toy": {
        "model.optimizer.lr": "3e-3",
        "model.loss.eta": "4",
        "rollout.reward": "benchmarks.toy_task.score",
        "rollout.sampler": "TransformersSampler",
        "rollout.sampling.max_response_tokens": str(TOKENS),
        "rollout.val_num_responses": "2",
        "data.val_prompts": "32",
        "data.prompts_per_round": "32",
        "data.batch_size": "8",
        "data.max_val_pairs": "0",
        "trainer.max_epochs": "10",
    },
    "quickstart": {},
}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--task", choices=SETTINGS, default="toy")
    parser.add_argument("--selector", action="append", help="default: BestWorst and AllPairs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, help="default: the task's")
    parser.add_argument("--num_responses", type=int, default=4)
    parser.add_argument("--lr", type=float, help="default: the task's")
    parser.add_argument("--eta", type=float, help="nats per reward unit; default: the task's")
    parser.add_argument("--plot", help="a .png file")
    args = parser.parse_args()
    selectors = args.selector or ["BestWorst", "AllPairs"]
    print(describe_machine(), flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_toy_model(folder / "model")
        save_prompts(folder / "prompts.jsonl")
        curves = {s: [run(args, folder, s, seed) for seed in range(1, args.seeds + 1)] for s in selectors}
    print(format_table(["", "reward at the end, seed by seed", "mean", "seconds a round"], table(curves)))
    print(f"\nAt the time of the shortest run: {at_equal_time(curves)}")
    if args.plot:
        plot(curves, args.plot)


def run(args: argparse.Namespace, folder: Path, selector: str, seed: int) -> list[Point]:
    """Train a run, and read its curve from its store."""
    run_dir = folder / f"{selector}-{seed}"
    settings = SETTINGS[args.task] | {
        "rollout.selector": selector,
        "rollout.sampling.num_responses": str(args.num_responses),
        "seed_everything": str(seed),
        "trainer.default_root_dir": str(run_dir),
        "trainer.logger": "false",
        "trainer.enable_checkpointing": "false",
    }
    if args.task == "toy":
        settings |= {"model.policy": str(folder / "model"), "data.prompts": str(folder / "prompts.jsonl")}
    for option, value in (
        ("model.optimizer.lr", args.lr),
        ("model.loss.eta", args.eta),
        ("trainer.max_epochs", args.rounds),
    ):
        settings |= {} if value is None else {option: str(value)}
    config = ["--config", "configs/quickstart.yaml"] if args.task == "quickstart" else []
    optimizer = [] if config else ["--model.optimizer", "rlhf_pl.optim.AdamW"]
    options = [text for option, value in settings.items() for text in (f"--{option}", value)]
    command = [sys.executable, "-m", "rlhf_pl", "fit", *config, *optimizer, *options]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    print(f"{selector}, seed {seed}: {done.stdout.strip().splitlines()[-1][:100]}", file=sys.stderr, flush=True)
    return read_curve(run_dir)


def read_curve(run_dir: Path) -> list[Point]:
    """(responses, seconds, held-out reward) before the first round and after each."""
    samples, seconds, curve = 0, 0.0, []
    for version, manifest in enumerate(sorted(run_dir.glob("heldout/*/manifest.json"))):
        if version:
            stages = json.loads((run_dir / f"rounds/{version - 1:04d}/manifest.json").read_text())["stages"]
            samples += stages["responses"]["responses"]
            seconds += sum(stages[stage]["seconds"] for stage in ("responses", "rewards", "logps", "training"))
        curve.append((samples, seconds, json.loads(manifest.read_text())["stages"]["rewards"]["mean"]))
    return curve


def table(curves: dict[str, list[list[Point]]]) -> list[list[str]]:
    """A row for each selector."""
    rows = []
    for selector, runs in curves.items():
        ends = [run[-1][2] for run in runs]
        seconds = sum(run[-1][1] for run in runs) / sum(len(run) - 1 for run in runs)
        rows.append([selector, " ".join(f"{end:.3f}" for end in ends), f"{mean(ends):.3f}", f"{seconds:.2f}"])
    return rows


def at_equal_time(curves: dict[str, list[list[Point]]]) -> str:
    """The mean reward of each selector at the time at which the first of all runs ended."""
    end = min(run[-1][1] for runs in curves.values() for run in runs)
    return ", ".join(f"{name} {mean([reward_at(run, end) for run in runs]):.3f}" for name, runs in curves.items())


def reward_at(run: Sequence[Point], seconds: float) -> float:
    """The held-out reward at a time, between two evaluations on a line."""
    for (_, left, before), (_, right, after) in itertools.pairwise(run):
        if left <= seconds <= right:
            return before + (after - before) * (seconds - left) / (right - left)
    return run[-1][2]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def plot(curves: dict[str, list[list[Point]]], file: str) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True)
    for number, (name, runs) in enumerate(curves.items()):
        for run in runs:
            for column, part in enumerate(axes):
                label = name if run is runs[0] else None
                part.plot(
                    [p[column] for p in run], [p[2] for p in run], color=f"C{number}", marker="o", ms=3, label=label
                )
    axes[0].set(xlabel="responses sampled", ylabel="held-out reward")
    axes[1].set(xlabel="seconds of the rounds")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
