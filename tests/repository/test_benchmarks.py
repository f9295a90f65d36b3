"""The benchmarks run, and the variants that they compare train equally."""

import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import training_step
from benchmarks.algorithms.held_out import HeldOut
from benchmarks.algorithms.plots import plot
from benchmarks.algorithms.results import FINAL, TUNING, Results, Run
from benchmarks.algorithms.tables import final_table, tuning_table
from benchmarks.algorithms.tasks import TASKS, prepare
from benchmarks.algorithms.training import train

ROOT = Path(__file__).parents[2]
SHARED = ("__init__", "common", "made_up", "mfu", "toy_task", "grpo_update")
FILES = [*(ROOT / "benchmarks").glob("*.py"), *(main.parent for main in (ROOT / "benchmarks").glob("*/__main__.py"))]
SCRIPTS = sorted(p.stem for p in FILES if p.stem not in SHARED)
TINY = replace(TASKS["toy"], rates=(1e-2, 2e-2), rounds=1, prompts=4, update=2, held_out=3)


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


def test_algorithms_train_from_one_start_on_equal_samples(tmp_path: Path) -> None:
    files = prepare("toy", tmp_path)
    curves = {name: train(TINY, files, name, 1e-2, 1) for name in ("rebel-all-pairs", "ppo")}
    starts = [{k: v for k, v in curve[0].items() if k != "seconds"} for curve in curves.values()]
    assert starts[0] == starts[1]
    assert starts[0]["kl"] == 0
    for curve in curves.values():
        assert [point["samples"] for point in curve] == [0, 16]
        assert curve[1]["kl"] > 0
        assert curve[1]["seconds"] > curve[0]["seconds"]


def test_kl_to_the_start(tmp_path: Path) -> None:
    """Padded rows give the same as each row alone, and that is a sum over the vocabulary."""
    files = prepare("toy", tmp_path)
    held_out = HeldOut(TINY, files.model, files.held_out)
    for parameter in held_out.policy.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    rows = [([1, 7, 9], [11, 12, 13]), ([1, 7], [8, 2]), ([1], [5])]
    together = held_out._distances(rows)
    alone = [held_out._distances([row]) for row in rows]
    assert together[0].tolist() == pytest.approx([kl.item() for kl, _ in alone], rel=1e-4)
    with torch.no_grad():
        new, old = (m(torch.tensor([[1]])).logits.log_softmax(-1).flatten() for m in (held_out.policy, held_out.start))
    expected = sum(p.exp() * (p - q) for p, q in zip(new, old, strict=True))
    assert alone[2][0].item() == pytest.approx(expected.item(), rel=1e-4)


def test_results_are_kept_and_plotted_without_running_again(tmp_path: Path) -> None:
    """By hand: rewards 1 and 3 have the mean 2 and the standard error sqrt(2 / 2) = 1."""
    results = Results(tmp_path / "results.jsonl", "toy", TINY)

    def point(samples: int, reward: float) -> dict[str, float]:
        return {"samples": samples, "seconds": samples / 10, "reward": reward, "kl": reward, "entropy": 1.0}

    for phase, seed, rate, reward in ((TUNING, 101, 1e-2, 1.0), (TUNING, 101, 2e-2, 2.0)):
        results.add(Run("toy", "rloo", rate, seed, phase, [point(0, 0.5), point(16, reward)]))
    results.add(Run("toy", "grpo", 1e-2, 101, TUNING, []))  # failed
    for seed, reward in ((1, 1.0), (2, 3.0)):
        results.add(Run("toy", "rloo", 2e-2, seed, FINAL, [point(0, 0.5), point(16, reward)]))
    again = Results(tmp_path / "results.jsonl", "toy", TINY)
    assert again.runs == results.runs
    assert again.best_rate("rloo") == 2e-2
    assert "1 of 1 failed" in tuning_table(again)
    assert "2.000 ± 1.000" in final_table(again)
    plot([again], str(tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert not Results(tmp_path / "results.jsonl", "toy", replace(TINY, rounds=2)).runs  # other settings
