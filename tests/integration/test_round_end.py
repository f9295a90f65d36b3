"""A run that dies between a round's last update and its end repeats the round's end when it resumes."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.cli import ReduceLROnPlateau
from safetensors.torch import load_file

from rlhf_pl import SFTDataModule, SFTModule
from rlhf_pl.callbacks import EpochRun, HFExport, RoundCheckpoint, SampleTable, hf_export, round_checkpoint
from rlhf_pl.checkpointing.checkpoints import read_progress
from rlhf_pl.checkpointing.resume import find_resume_point
from rlhf_pl.optim import AdamW
from rlhf_pl.store.round_store import RoundStore
from tests.integration import test_fit
from tests.integration.test_fit import PROMPTS, assert_same

EPOCHS = 3


class Killed(BaseException):
    """Raised in place of SIGKILL, which can't be handled."""


class EndRecorder(L.Callback):
    """Records the metrics at every epoch's end, and the number of ends so far, which is part of its state."""

    def __init__(self) -> None:
        self.seen = 0
        self.found: dict[int, list[dict[str, float]]] = {}

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log("mine", float(batch_idx), on_step=False, on_epoch=True, batch_size=1)

    def on_train_epoch_end(self, trainer: L.Trainer, module: Any) -> None:
        self.seen += 1
        metrics = {n: float(v) for n, v in trainer.callback_metrics.items() if not n.startswith(("time/", "system/"))}
        metrics |= {"seen": self.seen, "steps": trainer.fit_loop.epoch_loop._batches_that_stepped}
        for varying in (
            "train/pairs_per_s",
            "rollout/sampler_logp_error",
        ):  # times, and a metric that is logged at every weight sync
            metrics.pop(varying, None)
        self.found.setdefault(trainer.current_epoch, []).append(metrics)

    def state_dict(self) -> dict[str, int]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]


class Killer(L.Callback):
    """Raises `Killed` at a hook of an epoch, if one is given."""

    def __init__(self, hook: str | None, epoch: int = 1) -> None:
        self.epoch = epoch
        if hook is not None:
            setattr(self, hook, self._raise)

    def _raise(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.current_epoch == self.epoch and trainer.global_step > 0:
            raise Killed


def _kill_at(owner: Any, name: str, condition: Callable[..., bool], monkeypatch: pytest.MonkeyPatch) -> None:
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if condition(*args):
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


POINTS: dict[str, Callable[[pytest.MonkeyPatch], None] | None] = {
    "on_validation_start": None,
    "on_validation_batch_end": None,
    "on_validation_end": None,
    "on_train_epoch_end": None,
    "before an export is renamed": lambda patch: _kill_at(
        hf_export, "_apply_umask", lambda folder: "round-2" in folder.name, patch
    ),
    "before the round is saved": lambda patch: _kill_at(
        RoundCheckpoint, "_save", lambda self, trainer, name: name == "after-round-0002.ckpt", patch
    ),
    "before it is linked": lambda patch: _kill_at(
        round_checkpoint, "link_last", lambda file: file.name == "after-round-0002.ckpt", patch
    ),
    "before the last one is linked": lambda patch: _kill_at(
        round_checkpoint, "link_last", lambda file: file.name == f"after-round-000{EPOCHS}.ckpt", patch
    ),
    "before others are removed": lambda patch: _kill_at(
        RoundCheckpoint, "_remove_old", lambda self, file: file.name == f"after-round-000{EPOCHS}.ckpt", patch
    ),
}


@contextmanager
def killing(point: str) -> Iterator[str | None]:
    """Kill a run inside the block at `point`; yields the hook for `Killer`, if the point is a hook."""
    patch = POINTS[point]
    with pytest.MonkeyPatch.context() as monkeypatch:
        if patch is not None:
            patch(monkeypatch)
        yield point if patch is None else None


def sft(folder: Path, llama: Path, file: str, callbacks: list[L.Callback], every: int = 1, **options: Any) -> Any:
    """Train three epochs, resuming from the last checkpoint as the command line does."""
    L.seed_everything(3, verbose=False)
    point = find_resume_point(str(folder), None, EPOCHS, False)
    point.commit()
    run = L.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        check_val_every_n_epoch=every,
        callbacks=[EpochRun(), HFExport(dtype="float32", every_round=True), RoundCheckpoint(2), *callbacks],
        **{"max_epochs": EPOCHS} | options,
    )
    module = SFTModule(
        str(llama),
        optimizer=lambda p: AdamW(p, lr=3e-3),
        lr_scheduler=lambda o: ReduceLROnPlateau(o, "val/loss", patience=0, threshold=1e9, threshold_mode="abs"),
    )
    data = SFTDataModule(file, max_tokens=64, batch_size=2, val_conversations=6)
    run.fit(module, datamodule=data, ckpt_path=None if point.checkpoint is None else str(point.checkpoint))
    return run


def read_run(folder: Path) -> dict[str, Any]:
    """Read the names of all files, the exports' weights, and the last checkpoint without paths and times."""
    files = sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file() and f.name != "metrics.csv")
    saved = torch.load(folder / "checkpoints" / f"after-round-000{EPOCHS}.ckpt", weights_only=True)
    states = {key: state for key, state in saved["callbacks"].items() if "ModelCheckpoint" not in key}
    return {
        "files": files,
        "last": (folder / "checkpoints" / "last.ckpt").resolve().name,
        "exports": {f.parent.name: load_file(f) for f in folder.glob("model*/model.safetensors")},
        "states": states,
        "schedules": saved["lr_schedulers"],
        "loops": [saved["loops"]["fit_loop"][name] for name in ("epoch_progress", "epoch_loop.batch_progress")],
        "page": (folder / "samples.html").read_text() if (folder / "samples.html").exists() else None,
    }


def assert_same_end(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, tensors in expected.pop("exports").items():
        assert_same(found["exports"][name], tensors)
    found.pop("exports")
    assert json.dumps(found, default=str, indent=1) == json.dumps(expected, default=str, indent=1)


@pytest.mark.parametrize(
    ("monitor", "every", "epoch", "points"),
    [("val/loss", 1, 1, tuple(POINTS)), ("train/loss", 2, 2, ("on_train_epoch_end", "before the last one is linked"))],
)
def test_an_epochs_end_is_repeated_after_a_kill(
    tmp_path: Path,
    llama: Path,
    write_jsonl: Callable[..., str],
    monitor: str,
    every: int,
    epoch: int,
    points: tuple[str, ...],
) -> None:
    """In an epoch with validation, and in one without."""
    rows = [{"prompt": f"Say {i}", "response": f"I say {i}, of course."} for i in range(16)]
    file = write_jsonl(rows)

    def run(name: str, hook: str | None = None) -> EndRecorder:
        ends, best = EndRecorder(), ModelCheckpoint(tmp_path / name / "best", monitor=monitor, save_top_k=2)
        early = EarlyStopping(monitor, patience=9, min_delta=1e9, check_on_train_epoch_end=True)
        average = EMAWeightAveraging(decay=0.5)
        sft(tmp_path / name, llama, file, [ends, average, early, best, Killer(hook, epoch)], every)
        return ends

    whole = run("whole")
    expected = read_run(tmp_path / "whole")
    for number, point in enumerate(points):
        with killing(point) as hook, pytest.raises(Killed):
            run(str(number), hook)
        again = run(str(number))
        assert_same_end(read_run(tmp_path / str(number)), read_run(tmp_path / "whole"))
        for index, ends in again.found.items():
            assert ends == whole.found[index], (point, index)
        assert 2 in again.found or "last" in point or "others" in point
    assert len(expected["exports"]) == EPOCHS + 1


@pytest.mark.parametrize("point", ["on_train_epoch_end", "before the round is saved", "before the last one is linked"])
def test_a_rounds_end_is_repeated_after_a_kill(
    tmp_path: Path, llama: Path, write_jsonl: Callable[..., str], point: str
) -> None:
    """Responses, scores, samples, exports and metrics of callbacks; the manifest keeps its record of the training."""
    prompts = write_jsonl(PROMPTS)

    def run(name: str, hook: str | None = None) -> EndRecorder:
        folder, ends = tmp_path / name, EndRecorder()
        early = EarlyStopping("val/reward_mean", patience=9, min_delta=1e9)
        best = ModelCheckpoint(folder / "best", monitor="val/loss", save_top_k=2)
        callbacks = [Killer(hook), ends, SampleTable(3), HFExport(every_round=True), RoundCheckpoint(0), early, best]
        resume = find_resume_point(str(folder), None, EPOCHS, False)
        resume.commit()
        ckpt = None if resume.checkpoint is None else str(resume.checkpoint)
        options = {"enable_checkpointing": True, "max_epochs": EPOCHS, "ckpt_path": ckpt}
        test_fit.fit(folder, llama, prompts, callbacks, **options)
        return ends

    whole = run("whole")
    with killing(point) as hook, pytest.raises(Killed):
        run("parts", hook)
    recorded = RoundStore(tmp_path / "parts").round(1).manifest["stages"]["training"]
    again = run("parts")
    assert RoundStore(tmp_path / "parts").round(1).manifest["stages"]["training"] == recorded
    assert_same_end(read_run(tmp_path / "parts"), read_run(tmp_path / "whole"))
    for epoch, ends in again.found.items():
        assert ends == whole.found[epoch], epoch


def test_max_steps_at_a_rounds_last_update_does_not_skip_its_end(
    tmp_path: Path, llama: Path, write_jsonl: Callable[..., str]
) -> None:
    file = write_jsonl([{"prompt": f"Say {i}", "response": f"I say {i}, of course."} for i in range(16)])
    with pytest.raises(Killed):
        sft(tmp_path, llama, file, [Killer("on_train_epoch_end")], max_steps=6)
    progress = read_progress((tmp_path / "checkpoints" / "last.ckpt").resolve())
    assert progress is not None
    assert (progress.global_step, progress.rounds_done, progress.has_ended_round) == (6, 2, False)
    run = sft(tmp_path, llama, file, [], max_steps=6)
    assert run.global_step == 6
    assert (tmp_path / "model-round-2" / "model.safetensors").exists()
    assert not (tmp_path / "model-round-3").exists()
    assert (tmp_path / "checkpoints" / "last.ckpt").resolve().name == "after-round-0002.ckpt"
