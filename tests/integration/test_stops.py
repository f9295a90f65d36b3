"""A stop inside a round or epoch leaves it incomplete; the next start continues with the same numbers."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision

from rlhf_pl.callbacks import RoundCheckpoint
from rlhf_pl.optim import AdamW, WarmupCosine
from rlhf_pl.store.round_store import RoundStore
from tests.integration import test_fit
from tests.integration.test_fit import PROMPTS, assert_same, weights


@pytest.fixture
def prompts(write_jsonl: Callable[..., str]) -> str:
    return write_jsonl(PROMPTS)


fit = partial(test_fit.fit, enable_checkpointing=True)


class UpdateRecorder(L.Callback):
    """Records the loss and learning rate of every update in order, also in a resumed run."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rates: list[float] = []
        self._steps = 0

    def on_train_start(self, trainer: L.Trainer, *args: Any) -> None:
        self._steps = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step > self._steps:
            self._steps = trainer.global_step
            self.losses.append(float(trainer.callback_metrics["train/loss"]))
            self.rates.append(float(trainer.callback_metrics["train/lr"]))


class StopAt(L.Callback):
    """Sets `should_stop` after a number of micro-batches of a process."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.left -= 1
        trainer.should_stop = trainer.should_stop or self.left == 0


@pytest.mark.parametrize("stop", ["max_steps", "limit_train_batches", "share", "inside an update", "before an update"])
def test_after_a_stop_inside_a_round_the_run_continues_at_the_next_pair(
    tmp_path: Path, llama: Path, prompts: str, stop: str
) -> None:
    whole = UpdateRecorder()
    _, module = fit(tmp_path / "whole", llama, prompts, [whole, RoundCheckpoint()])
    run, parts = tmp_path / "parts", UpdateRecorder()
    options: dict[str, Any] = {
        "max_steps": {"max_steps": 1},
        "limit_train_batches": {"limit_train_batches": 1},
        "share": {"limit_train_batches": 0.3},
    }.get(stop, {})
    callbacks = {"inside an update": [StopAt(3)], "before an update": [StopAt(1)]}.get(stop, [])
    first, _ = fit(run, llama, prompts, [parts, RoundCheckpoint(0), *callbacks], **options)
    assert not RoundStore(run).round(0).is_complete("training")
    assert first.global_step == (0 if stop == "before an update" else 1) < len(whole.losses) / 2
    last = run / "checkpoints" / "last.ckpt"
    assert last.exists() == (first.global_step > 0)
    ckpt = str(last) if last.exists() else None
    _, resumed = fit(run, llama, prompts, [again := UpdateRecorder(), RoundCheckpoint(0)], ckpt_path=ckpt)
    assert parts.losses + again.losses == whole.losses
    assert_same(weights(module), weights(resumed))


def test_max_steps_counts_over_a_resume_at_a_rounds_end(tmp_path: Path, llama: Path, prompts: str) -> None:
    """Lightning alone would skip the second round without an update and count it as complete."""
    first, _ = fit(tmp_path, llama, prompts, [RoundCheckpoint()], max_epochs=1)
    ckpt = str(tmp_path / "checkpoints" / "last.ckpt")
    steps = first.global_step
    second, _ = fit(tmp_path, llama, prompts, [RoundCheckpoint()], ckpt_path=ckpt, max_steps=steps + 1)
    assert second.global_step == steps + 1
    assert not RoundStore(tmp_path).round(1).is_complete("training")
    third, _ = fit(tmp_path, llama, prompts, [RoundCheckpoint()], ckpt_path=ckpt, max_steps=steps + 1)
    assert third.global_step == steps + 1
    assert third.max_steps == steps + 1  # the Trainer's option is restored


@pytest.mark.parametrize("monitor", ["train/round_kl", "val/loss", "val/reward_mean", "rollout/reward_mean"])
@pytest.mark.parametrize("every", [1, 2])
def test_callbacks_that_monitor_a_metric_skip_a_stop(
    tmp_path: Path, llama: Path, prompts: str, monitor: str, every: int
) -> None:
    """After stops inside the first and second round, state and files equal those of a run without stops."""

    def run(name: str, stops: tuple[int, ...]) -> tuple[dict[str, Any], ...]:
        folder, ckpt = tmp_path / name, None
        for max_steps in (*stops, -1):
            early = EarlyStopping(monitor, patience=9, min_delta=1e9)
            best = ModelCheckpoint(folder / "best", monitor=monitor, save_top_k=1)
            options: dict[str, Any] = {"max_steps": max_steps, "ckpt_path": ckpt, "check_val_every_n_epoch": every}
            fit(folder, llama, prompts, [RoundCheckpoint(keep_rounds=2), early, best], **options)
            ckpt = str(folder / "checkpoints" / "last.ckpt")
        kept = {"best": Path(best.best_model_path).name, "score": float(best.best_model_score or 0)}
        return early.state_dict(), kept, {"files": sorted(file.name for file in (folder / "best").iterdir())}

    whole = run("whole", ())
    assert whole[0]["wait_count"] == 2 // every - 1
    assert run("parts", (1, updates_of_first_round(tmp_path / "whole") + 1)) == whole


@pytest.mark.parametrize("batch", [1, 3])
def test_a_rounds_metrics_exist_after_a_stop_inside_it(tmp_path: Path, llama: Path, prompts: str, batch: int) -> None:
    """They are logged again before its first update, and can be monitored after it. Without held-out prompts."""
    data = {"val_prompts": 0}
    one, _ = fit(tmp_path, llama, prompts, [RoundCheckpoint(0), StopAt(batch)], data=data, max_epochs=1)
    last = tmp_path / "checkpoints" / "last.ckpt"
    ckpt = str(last) if last.exists() else None
    early = [EarlyStopping("rollout/sampler_logp_error"), EarlyStopping("system/resident_gib")]
    two, _ = fit(tmp_path, llama, prompts, [RoundCheckpoint(0), *early], data=data, max_epochs=1, ckpt_path=ckpt)
    name = "rollout/sampler_logp_error"
    assert two.callback_metrics[name] == one.callback_metrics[name]
    logged = (tmp_path / "csv" / "metrics.csv").read_text().splitlines()
    assert (name in logged[0]) == (batch == 1)


def updates_of_first_round(run: Path) -> int:
    """Number of updates of the first round."""
    return torch.load(run / "checkpoints" / "after-round-0001.ckpt", weights_only=True)["global_step"]


def test_steps_that_a_scaler_skips_are_not_updates(tmp_path: Path, llama: Path, prompts: str) -> None:
    """The first gradients overflow at this scale; after that, rates equal those of a run without skipped steps."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120, backoff_factor=2.0**-110, growth_interval=10**6)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    module = {"optimizer": lambda p: AdamW(p, lr=1e-3, fused=False), "lr_scheduler": lambda o: WarmupCosine(o, 0.5)}
    normal = UpdateRecorder()
    whole, _ = fit(tmp_path / "whole", llama, prompts, [normal, RoundCheckpoint()], module)
    skipping = UpdateRecorder()
    trainer, rebel = fit(tmp_path / "scaled", llama, prompts, [skipping, RoundCheckpoint()], module, plugins=[plugin])
    skipped = rebel.optimization.skipped.in_run
    assert skipped >= 1
    assert trainer.global_step == whole.global_step - skipped
    assert skipping.rates == pytest.approx(normal.rates[: len(normal.rates) - skipped])


def test_a_schedule_monitors_a_metric(tmp_path: Path, llama: Path, prompts: str) -> None:
    """With patience 0 and an unreachable threshold, the rate is divided by 10 after every round but the first."""
    from lightning.pytorch.cli import ReduceLROnPlateau

    def plateau(optimizer: Any) -> Any:
        return ReduceLROnPlateau(optimizer, "val/loss", patience=0, threshold=1e9, threshold_mode="abs")

    module = {"lr_scheduler": plateau}
    _, one = fit(
        tmp_path / "whole", llama, prompts, [recorder := UpdateRecorder(), RoundCheckpoint()], module, max_epochs=3
    )
    per_round = len(recorder.rates) // 3
    expected = [rate for rate in (1e-3, 1e-3, 1e-4) for _ in range(per_round)]
    assert recorder.rates == pytest.approx(expected)
    fit(tmp_path / "parts", llama, prompts, [RoundCheckpoint()], module, max_epochs=2)
    ckpt = str(tmp_path / "parts" / "checkpoints" / "last.ckpt")
    _, other = fit(tmp_path / "parts", llama, prompts, [RoundCheckpoint()], module, max_epochs=3, ckpt_path=ckpt)
    assert_same(weights(one), weights(other))
