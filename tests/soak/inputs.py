"""Malformed inputs of every kind: model folders, data files, configs, and rewards that misbehave.

    python -m tests.soak.inputs [--trials 60]

The trial succeeds if each is accepted, or refused by one error of a few lines, with exit code 1 or 2 and without a run
directory, or with complete rounds only in it. A traceback and exit code 0 without a model are failures.
"""

import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from rlhf_pl.store.round_store import RoundStore
from tests.integration.test_kill_matrix import TRANSFORMERS, make_plan, run_driver
from tests.soak.faults import FILE_FAULTS, parse_arguments, print_report

REWARDS = {
    "raises": "raise ValueError('no')",
    "returns text": "return 'good'",
    "returns None": "return None",
    "returns NaN": "return float('nan')",
    "returns 1e400": "return 10**400",
    "returns 1.7e308": "return 1.7e308 * (-1) ** len(response)",
    "returns a list": "return [1.0]",
    "returns a dict": "return {'reward': 1.0}",
    "exits with 0": "import sys; sys.exit(0)",
    "raises a BaseException": "raise BaseException('no')",
    "raises KeyboardInterrupt": "raise KeyboardInterrupt",
    "runs out of stack": "return score(response)",
    "changes directory": "import os; os.chdir('/'); return 1.0 * len(set(response))",
    "closes stdout": "import sys; sys.stdout = None; return 1.0 * len(set(response))",
    "5 MB of message": "raise ValueError('x' * 5_000_000)",
    "hangs and swallows": "\n    try:\n        while True: pass\n    except BaseException:\n        return 0.0",
}
BATCHES = {
    "a dict": "{i: 1.0 for i in range(len(responses))}",
    "a set": "set(range(len(responses)))",
    "text": "'1' * len(responses)",
    "bytes": "b'1' * len(responses)",
    "too many": "[1.0] * (len(responses) + 1)",
    "a generator": "(1.0 * len(r) for r in responses)",
    "texts": "['1'] * len(responses)",
}
FAILURES = ("TRACEBACK", "NO MODEL", "EXIT CODE", "HALF WRITTEN")


def find_damaged_files(folder: Path, rng: random.Random) -> list[tuple[str, list[str]]]:
    """List (kind of input, options that name it): every fault of every file of the model, the data and a config."""
    found = []
    config = folder / "config.yaml"
    config.write_text("model:\n  optimizer:\n    class_path: AdamW\n    init_args: {lr: 1.0e-3}\nseed_everything: 3\n")
    model = folder / "llama"
    files = [(file, "--model.policy") for file in sorted(model.iterdir())]
    files += [(folder / "prompts.jsonl", "--data.prompts"), (folder / "reward.py", "--rollout.reward")]
    files += [(config, "--config")]
    for file, option in files:
        for fault in FILE_FAULTS:
            place = folder / f"damaged{len(found)}"
            if file.parent == model:
                shutil.copytree(model, place)
            else:
                place.mkdir()
                shutil.copy(file, place)
            fault(place / file.name, rng)
            named = place if file.parent == model else place / file.name
            kind = f"{'model' if file.parent == model else 'a'} {file.name}, {fault.__name__}"
            found.append((kind, [option, f"{named}:score" if option == "--rollout.reward" else str(named)]))
    return found


def make_rewards(folder: Path) -> list[tuple[str, list[str]]]:
    """Write the rewards; returns (kind of input, options that name it)."""
    found = []
    for number, (kind, body) in enumerate(REWARDS.items()):
        file = folder / f"one{number}.py"
        file.write_text(f"def score(response):\n    {body}\n")
        found.append((f"reward that {kind}", ["--rollout.reward", f"{file}:score"]))
    for number, (kind, body) in enumerate(BATCHES.items()):
        file = folder / f"many{number}.py"
        file.write_text(f"def score(responses):\n    return {body}\n")
        found.append((f"batched reward of {kind}", ["--rollout.reward", f"{file}:score"]))
    return found


def classify_outcome(run: Path, log: str, status: int) -> str:
    """Classify the end of a run."""
    if "Traceback" in log:
        return "TRACEBACK"
    if status == 0:
        return "accepted" if (run / "model" / "model.safetensors").is_file() else "NO MODEL"
    if status not in (1, 2) or log.count("error: ") != 1:
        return f"EXIT CODE {status}"
    if not run.exists():
        return "refused before anything is written"
    store = RoundStore(run)
    is_complete = not store.find_damage() and (store.rounds() or store.evaluations()) and not (run / "model").exists()
    return "refused in the run" if is_complete else "HALF WRITTEN"


def main() -> int:
    arguments = parse_arguments(__doc__.splitlines()[0])
    rng, started = random.Random(arguments.seed), time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        plan = make_plan(folder, TRANSFORMERS)
        plan["arguments"] += ["--trainer.max_epochs", "1", "--rollout.scoring.backoff_s", "0"]
        plan["arguments"] += ["--rollout.scoring.timeout_s", "2", "--data.prompts_per_round", "4"]
        tried = find_damaged_files(folder, rng) + make_rewards(folder)
        if arguments.trials is not None:
            tried = rng.sample(tried, min(arguments.trials, len(tried)))
        runs = [folder / f"run{number}" for number in range(len(tried))]
        table, bad = Counter[tuple[str, str]](), 0
        for first in range(0, len(tried), 20):
            part = list(zip(tried, runs, strict=True))[first : first + 20]
            statuses = run_driver(folder, plan, [{"dir": str(run), "arguments": options} for (_, options), run in part])
            for ((kind, _), run), status in zip(part, statuses, strict=True):
                log = Path(f"{run}.log").read_text()
                outcome = classify_outcome(run, log, status)
                bad += outcome.startswith(FAILURES)
                table[kind.partition(",")[0].partition(" that ")[0].partition(" of ")[0], outcome] += 1
                print(f"{kind}: {outcome}", flush=True)
                if outcome.startswith(FAILURES):
                    print(log[-3000:])
                elif arguments.show and "error: " in log:
                    print(log[log.index("error: ") :].strip())
    return print_report("input", table, bad, started)


if __name__ == "__main__":
    sys.exit(main())
