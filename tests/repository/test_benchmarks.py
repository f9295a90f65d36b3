"""The benchmarks run, and the variants that they compare train equally."""

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks import training_step

ROOT = Path(__file__).parents[2]
SHARED = ("__init__", "common", "made_up", "mfu", "toy_task")
SCRIPTS = sorted(p.stem for p in (ROOT / "benchmarks").glob("*.py") if p.stem not in SHARED)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_benchmark_has_help_and_documentation(script: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{script}", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert script in (ROOT / "Makefile").read_text()
    assert script in (ROOT / "benchmarks" / "README.md").read_text()


def test_layouts_train_equally(llama: Path) -> None:
    """The loss of the second update depends on the gradient of the first."""
    losses = []
    for variant in ("fixed", "padded", "chunked", "shared"):
        args = Namespace(device="cpu", micro_batch=4, model=str(llama), scale=0.1, pairs=8, updates=1, seed=3)
        losses.append(training_step.measure(args, "short", variant)["loss"])
    assert losses[1:] == pytest.approx(losses[:1] * 3, rel=1e-4)
