"""Files of a run directory that are damaged while the run is away, and the same command again.

    python -m tests.soak.damage [--trials 50] [--seed 7]

It holds if a run either goes on and ends as one whose files are whole, to the last bit, or ends with one error of a
few lines, after which `--repair` is tried. A traceback, other weights, and exit code 0 without a model are failures.
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

from tests.integration.test_kill_matrix import TRANSFORMERS, drive, make_plan, run_reference
from tests.soak.harm import OF_FILES, OF_FOLDERS, Harm, arguments_of, report

REFUSED, REPAIR = "refused", "refused; --repair: "
FAILURES = ("TRACEBACK", "NO MODEL", "OTHER WEIGHTS", "EXIT CODE")


def kind_of(file: Path, run: Path) -> str:
    """Such as `checkpoints/*.ckpt`, `rounds/*/rewards/*.parquet`."""
    inside = file.relative_to(run)
    return "/".join("*" if part.isdigit() else _pattern(part) for part in inside.parts)


def _pattern(name: str) -> str:
    return re.sub(r"[0-9a-f]*\d[0-9a-f.\-]*(?=\.|$)", "*", name)


def stopped_run(folder: Path, plan: dict[str, Any]) -> Path:
    """A run that was killed in its second round's training."""
    run = folder / "stopped"
    kill = {"event": "after optimizer step", "count": 9, "delay": 0.0, "signal": signal.SIGKILL}
    status = drive(folder, plan, [{"dir": str(run), "kill": kill}])
    assert status == [-9], Path(f"{run}.log").read_text()
    return run


def points(run: Path, trials: int | None, rng: random.Random) -> list[tuple[Path, Harm]]:
    """Every kind of file and folder with everything that can happen to one, or some of these."""
    kinds: dict[tuple[str, bool], list[Path]] = {}
    for path in sorted(p for p in run.rglob("*") if not p.is_symlink()):
        kinds.setdefault((kind_of(path, run), path.is_file()), []).append(path)
    found = [
        (rng.choice(paths), harm)
        for (_, is_file), paths in sorted(kinds.items())
        for harm in (OF_FILES if is_file else OF_FOLDERS)
    ]
    return found if trials is None else rng.sample(found, min(trials, len(found)))


def verdict(run: Path, log: str, status: int, expected: dict[str, torch.Tensor]) -> str:
    """How a run ended."""
    if "Traceback" in log:
        return "TRACEBACK"
    if status == 0:
        if not (run / "model" / "model.safetensors").is_file():
            return "NO MODEL"
        found = load_file(run / "model" / "model.safetensors")
        same = all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        return "went on, identical" if same else "OTHER WEIGHTS"
    return REFUSED if status in (1, 2) and log.count("error: ") == 1 else f"EXIT CODE {status}"


def try_all(
    folder: Path,
    plan: dict[str, Any],
    whole: Path,
    trials: list[tuple[Path, Harm]],
    expected: dict[str, torch.Tensor],
    rng: random.Random,
    show: bool,
) -> list[str]:
    """How copies of a run end, each with one file damaged: at once, or with `--repair`."""
    runs = [folder / f"run{number}" for number in range(len(trials))]
    for run, (file, harm) in zip(runs, trials, strict=True):
        shutil.copytree(whole, run, symlinks=True)
        harm(run / file.relative_to(whole), rng)
    told = _go_on(folder, plan, runs, [], expected, show)
    refused = [run for run, outcome in zip(runs, told, strict=True) if outcome == REFUSED]
    repaired = dict(zip(refused, _go_on(folder, plan, refused, ["--repair"], expected, show), strict=True))
    for run in runs:
        shutil.rmtree(run)
    return [f"{REPAIR}{repaired[run]}" if run in repaired else outcome for run, outcome in zip(runs, told, strict=True)]


def _go_on(
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
    statuses = drive(folder, plan, [{"dir": str(run), "arguments": options} for run in runs]) if runs else []
    for run, status in zip(runs, statuses, strict=True):
        log = Path(f"{run}.log").read_text()
        found.append(verdict(run, log, status, expected))
        if found[-1].startswith(FAILURES) or (show and found[-1] == REFUSED):
            print(log[-3000:] if found[-1] != REFUSED else log[log.index("error: ") :].strip())
    return found


def main() -> int:
    arguments = arguments_of(__doc__.splitlines()[0])
    rng = random.Random(arguments.seed)
    started, table, bad = time.monotonic(), Counter[tuple[str, str]](), 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        plan = make_plan(folder, TRANSFORMERS)
        plan["arguments"] += ["--checkpoint.keep_rounds", "2"]
        run_reference(folder, plan)
        expected = load_file(folder / "reference" / "model" / "model.safetensors")
        whole = stopped_run(folder, plan)
        trials = points(whole, arguments.trials, rng)
        for first in range(0, len(trials), 10):
            part = trials[first : first + 10]
            told = try_all(folder, plan, whole, part, expected, rng, arguments.show)
            for number, ((file, harm), outcome) in enumerate(zip(part, told, strict=True), first + 1):
                table[f"`{kind_of(file, whole)}`", outcome] += 1
                bad += outcome.startswith(FAILURES) or outcome.removeprefix(REPAIR).startswith(FAILURES)
                print(f"{number:4} {harm.__name__:14} {file.relative_to(whole)}: {outcome}", flush=True)
    return report("file", table, bad, started)


if __name__ == "__main__":
    sys.exit(main())
