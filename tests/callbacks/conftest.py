"""A small run in rounds that many tests inspect, and a fixture that trains on its rounds again."""

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers.logger import Logger

from rlhf_pl import RebelModule, SamplingConfig
from rlhf_pl.callbacks import DegenerationGuard, HFExport, RoundCheckpoint, RoundProgress, RunReport, SampleTable
from rlhf_pl.store.round_store import RoundStore
from tests.integration.test_fit import PROMPTS, fit


def coarse(response: str) -> float:
    """A coarse reward, equal for many responses, so that some prompts give no pair."""
    return float(len(set(response)) // 5)


class Log(Logger):
    """Keeps all logged metrics and texts with their steps, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics: list[tuple[int, dict[str, float]]] = []
        self.texts: list[tuple[str, str, int]] = []

    @property
    def name(self) -> str:
        return "log"

    @property
    def version(self) -> int:
        return 0

    @property
    def experiment(self) -> Any:
        return SimpleNamespace(add_text=lambda tag, text, step: self.texts.append((tag, text, step)))

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.metrics.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def of(self, name: str) -> list[tuple[int, float]]:
        """Steps and values of one metric."""
        return [(step, metrics[name]) for step, metrics in self.metrics if name in metrics]


class WeightsRecorder(L.Callback):
    """Records the policy's weights at the start of every round and at the end of the run."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_train_epoch_start(self, trainer: L.Trainer, module: Any) -> None:
        self._record(module)

    def on_fit_end(self, trainer: L.Trainer, module: Any) -> None:
        self._record(module)

    def _record(self, module: Any) -> None:
        self.weights.append({name: tensor.clone() for name, tensor in module.weights().stream()})


@dataclass(frozen=True)
class SmallRun:
    """Two rounds of 10 prompts with 4 responses each; 4 held-out prompts with two responses each before and after.

    Responses are short and sampled at a low temperature, so that some finish, some repeat themselves and some are
    identical.
    """

    folder: Path
    prompts: str
    trainer: L.Trainer
    module: RebelModule
    log: Log
    printed: str
    seen: list[dict[str, torch.Tensor]] = field(repr=False)

    @property
    def store(self) -> RoundStore:
        return RoundStore(self.folder)

    @property
    def updates(self) -> list[int]:
        """Number of updates of each round."""
        first = next(step for step, _ in self.log.of("rollout/pairs")[1:])
        return [first, self.trainer.global_step - first]

    def rows(self, which: str, index: int) -> list[dict[str, Any]]:
        """Responses of round `index`, or of the evaluation after `index` rounds, each with its reward."""
        stored = self.store.round(index) if which == "rounds" else self.store.held_out(index)
        rewards = stored.read("rewards")["reward"].to_pylist()
        rows = stored.read("responses").to_pylist()
        return [row | {"reward": reward} for row, reward in zip(rows, rewards, strict=True)]


def capture_output(function: Callable[[], Any]) -> tuple[Any, str]:
    """Call a function; return its result and its printed output."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        result = function()
    return result, out.getvalue()


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> SmallRun:
    folder = tmp_path_factory.mktemp("callbacks")
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    log, recorder = Log(), WeightsRecorder()
    callbacks = [
        *(RoundProgress(), RunReport(num_samples=2), SampleTable(3), DegenerationGuard(max_kl=1e-6)),
        *(HFExport(dtype="float32", every_round=True), RoundCheckpoint(every_n_updates=2, keep_rounds=-1), recorder),
    ]
    options: dict[str, Any] = {"logger": log, "enable_checkpointing": True, "enable_progress_bar": True}
    refresh = {
        "reward": f"{__name__}.coarse",
        "sampling": SamplingConfig(num_responses=4, max_response_tokens=16, temperature=0.1),
    }
    (trainer, module), printed = capture_output(
        lambda: fit(folder / "run", llama, str(prompts), callbacks, refresh=refresh, **options)
    )
    return SmallRun(folder / "run", str(prompts), trainer, module, log, printed, recorder.weights)


@pytest.fixture
def again(run: SmallRun, llama: Path, tmp_path: Path) -> Callable[..., tuple[L.Trainer, RebelModule]]:
    """Trains on copies of the rounds of `run` in another directory; needs no sampler and no reward."""

    def train(
        *callbacks: L.Callback, prompts: str = run.prompts, held_out: bool = True, **options: Any
    ) -> tuple[L.Trainer, RebelModule]:
        for kind in ("rounds", "heldout") if held_out else ("rounds",):
            if not (tmp_path / "run" / kind).exists():
                shutil.copytree(run.folder / kind, tmp_path / "run" / kind)
        settings = {"max_epochs": 1, "logger": False, "refresh": {"reward": None}} | options
        return fit(tmp_path / "run", llama, prompts, list(callbacks), **settings)

    return train
