"""Damages files of a stopped run's directory, then runs the same command again.

    python -m tests.soak.damage [--trials 50] [--seed 7]

The trial succeeds if a run either resumes and ends like one with intact files, to the last bit, or ends with one error
of a few lines, after which `--repair` is tried. A traceback, other weights, or exit code 0 without a
model is a failure.
"""

import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.integration.test_kill_matrix import TRANSFORMERS, make_plan, run_driver, run_reference
from tests.soak.faults import FILE_FAULTS, FOLDER_FAULTS, Fault, parse_arguments, print_report

REFUSED, REPAIR = "refused", "refused; --repair: "
FAILURES = ("TRACEBACK", "NO MODEL", "OTHER WEIGHTS", "EXIT CODE")


def find_kind(file: Path, run: Path) -> str:
    """Replace numbers by `*`: `checkpoints/*.ckpt`, `rounds/*/rewards/*.parquet`."""
    inside = file.relative_to(run)
    return "/".join("*" if part.isdigit() else _pattern(part) for part in inside.parts)


def _pattern(name: str) -> str:
    return re.sub(r"[0-9a-f]*\d[0-9a-f.\-]*(?=\.|$)", "*", name)


def make_stopped_run(folder: Path, plan: dict[str, Any]) -> Path:
    """Kill a run in its second round's training; returns its directory."""
    run = folder / "stopped"
    kill = {"event": "after optimizer step", "count": 9, "delay": 0.0, "signal": signal.SIGKILL}
    status = run_driver(folder, plan, [{"dir": str(run), "kill": kill}])
    assert status == [-9], Path(f"{run}.log").read_text()
    return run


def choose_trials(run: Path, trials: int | None, rng: random.Random) -> list[tuple[Path, Fault]]:
    """Combine every kind of file and folder with every fault, or choose some combinations at random."""
    kinds: dict[tuple[str, bool], list[Path]] = {}
    for path in sorted(p for p in run.rglob("*") if not p.is_symlink()):
        kinds.setdefault((find_kind(path, run), path.is_file()), []).append(path)
    found = [
        (rng.choice(paths), fault)
        for (_, is_file), paths in sorted(kinds.items())
        for fault in (FILE_FAULTS if is_file else FOLDER_FAULTS)
    ]
    return found if trials is None else rng.sample(found, min(trials, len(found)))


def classify_outcome(run: Path, log: str, status: int, expected: dict[str, torch.Tensor]) -> str:
    """Classify the end of a run."""
    if "Traceback" in log:
        return "TRACEBACK"
    if status == 0:
        if not (run / "model" / "model.safetensors").is_file():
            return "NO MODEL"
        found = load_file(run / "model" / "model.safetensors")
        same = all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        return "resumed, identical" if same else "OTHER WEIGHTS"
    return REFUSED if status in (1, 2) and log.count("error: ") == 1 else f"EXIT CODE {status}"


def try_all(
    folder: Path,
    plan: dict[str, Any],
    stopped: Path,
    trials: list[tuple[Path, Fault]],
    expected: dict[str, torch.Tensor],
    rng: random.Random,
    show: bool,
) -> list[str]:
    """Damage one file in each copy of the run and resume it; returns the outcomes, with `--repair` if refused."""
    runs = [folder / f"run{number}" for number in range(len(trials))]
    for run, (file, fault) in zip(runs, trials, strict=True):
        shutil.copytree(stopped, run, symlinks=True)
        fault(run / file.relative_to(stopped), rng)
    outcomes = _resume(folder, plan, runs, [], expected, show)
    refused = [run for run, outcome in zip(runs, outcomes, strict=True) if outcome == REFUSED]
    repaired = dict(zip(refused, _resume(folder, plan, refused, ["--repair"], expected, show), strict=True))
    for run in runs:
        shutil.rmtree(run)
    return [
        f"{REPAIR}{repaired[run]}" if run in repaired else outcome for run, outcome in zip(runs, outcomes, strict=True)
    ]


def _resume(
    folder: Path,
    plan: dict[str, Any],
    runs: list[Path],
    options: list[str],
    expected: dict[str, torch.Tensor],
    show: bool,
) -> list[str]:
    for run in runs:
        Path(f"{run}.log").write_text("")
    found = []
    statuses = run_driver(folder, plan, [{"dir": str(run), "arguments": options} for run in runs]) if runs else []
    for run, status in zip(runs, statuses, strict=True):
        log = Path(f"{run}.log").read_text()
        found.append(classify_outcome(run, log, status, expected))
        if found[-1].startswith(FAILURES) or (show and found[-1] == REFUSED):
            print(log[-3000:] if found[-1] != REFUSED else log[log.index("error: ") :].strip())
    return found


def main() -> int:
    arguments = parse_arguments(__doc__.splitlines()[0])
    rng = random.Random(arguments.seed)
    started, table, bad = time.monotonic(), Counter[tuple[str, str]](), 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        plan = make_plan(folder, TRANSFORMERS)
        plan["arguments"] += ["--checkpoint.keep_rounds", "2"]
        run_reference(folder, plan)
        expected = load_file(folder / "reference" / "model" / "model.safetensors")
        stopped = make_stopped_run(folder, plan)
        trials = choose_trials(stopped, arguments.trials, rng)
        for first in range(0, len(trials), 10):
            part = trials[first : first + 10]
            outcomes = try_all(folder, plan, stopped, part, expected, rng, arguments.show)
            for number, ((file, fault), outcome) in enumerate(zip(part, outcomes, strict=True), first + 1):
                table[f"`{find_kind(file, stopped)}`", outcome] += 1
                bad += outcome.startswith(FAILURES) or outcome.removeprefix(REPAIR).startswith(FAILURES)
                print(f"{number:4} {fault.__name__:33} {file.relative_to(stopped)}: {outcome}", flush=True)
    return print_report("file", table, bad, started)


if __name__ == "__main__":
    sys.exit(main())
