"""Runs over fixed data: the printed line of an epoch, the lock, resume points, and the Trainer's restored options."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping

from rlhf_pl import SFTDataModule, SFTModule
from rlhf_pl.callbacks import EpochRun, RoundCheckpoint
from rlhf_pl.optim import AdamW
from rlhf_pl.utils.errors import InputError
from tests.conftest import make_tokenizer

ROWS = [{"prompt": f"Say {i}", "response": f"I say {i}, of course."} for i in range(10)]


@pytest.fixture
def train(tmp_path: Path, llama: Path, write_jsonl: Callable[..., str]) -> Callable[..., L.Trainer]:
    """Fits 10 conversations, two a batch; by default four of them are held out."""

    def fit(
        *callbacks: L.Callback,
        held_out: int = 4,
        ckpt_path: str | None = None,
        data: dict[str, Any] | None = None,
        **options: Any,
    ) -> L.Trainer:
        L.seed_everything(2, verbose=False)
        trainer = L.Trainer(
            accelerator="cpu", default_root_dir=tmp_path / "run", logger=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[EpochRun(), *callbacks], num_sanity_val_steps=0,
            **{"max_epochs": 2, "enable_checkpointing": bool(ckpt_path)} | options,
        )  # fmt: skip
        module = SFTModule(str(llama), optimizer=lambda p: AdamW(p, lr=3e-3))
        settings = {"max_tokens": 64, "batch_size": 2, "packing": False, "val_conversations": held_out} | (data or {})
        trainer.fit(module, datamodule=SFTDataModule(write_jsonl(ROWS), **settings), ckpt_path=ckpt_path)
        return trainer

    return fit


class Perplexity(L.Callback):
    """Held-out perplexity at every epoch's end, by the loss of transformers over the responses."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_epoch_end(self, trainer: L.Trainer, module: Any) -> None:
        total = count = 0.0
        for example in trainer.datamodule.val_set.examples:  # type: ignore[attr-defined]
            ids = torch.tensor([list(example.ids)])
            labels = torch.where(torch.tensor([list(example.mask)]), ids, -100)
            with torch.no_grad():
                total += module.policy.lm(input_ids=ids, labels=labels).loss.item() * sum(example.mask)
            count += sum(example.mask)
        self.found.append(math.exp(total / count))


def test_each_epoch_prints_its_held_out_perplexity(
    train: Callable[..., L.Trainer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    independent = Perplexity()
    train(independent)
    lines = capsys.readouterr().out.splitlines()
    tokenizer, run = make_tokenizer(), tmp_path / "run"
    lengths = {row["response"]: len(tokenizer(row["response"] + "<|end|>")["input_ids"]) - 1 for row in ROWS}
    begin, note, *epochs, end, kept = lines
    assert len(set(lengths.values())) == 1
    learned = 6 * next(iter(lengths.values()))
    assert begin == f"Conversations: 6 for training ({learned} response tokens), 4 held out. Run directory: {run}"
    assert note == "Note: an epoch has only 3 updates. Decrease `data.batch_size` (now 2) for more."
    assert end == "Done."  # without an export and a logger
    assert kept.startswith(f"Kept in {run}: ")
    assert epochs == [
        f"epoch {number}: held-out perplexity {found:.3f} (loss {math.log(found):.3f} nats a token, 4 conversations)"
        for number, found in enumerate(independent.found, 1)
    ]
    assert independent.found[1] < independent.found[0]


def test_an_epoch_of_few_updates_names_the_options_for_more(
    train: Callable[..., L.Trainer], capsys: pytest.CaptureFixture[str]
) -> None:
    """All ten rows are packed into one; and 8 updates of one row are enough, or what `limit_train_batches` wants."""
    train(held_out=0, data={"packing": True, "max_tokens": 256}, accumulate_grad_batches=3, max_epochs=2)
    options = "`data.max_tokens` (now 256) or `data.batch_size` (now 2) or `trainer.accumulate_grad_batches` (now 3)"
    assert capsys.readouterr().out.count(f"Note: an epoch has only 1 update. Decrease {options} for more.") == 1
    train(held_out=2, data={"batch_size": 1}, max_epochs=1)
    train(limit_train_batches=1, max_epochs=1)
    assert "Note:" not in capsys.readouterr().out


def test_an_epoch_without_validation_prints_its_training_loss(
    train: Callable[..., L.Trainer], capsys: pytest.CaptureFixture[str]
) -> None:
    """The Trainer still has the held-out metrics of the previous epoch, which must not be printed."""
    losses: list[str] = []

    class Loss(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
            losses.append(f"loss {float(trainer.callback_metrics['train/loss']):.3f}")

    train(Loss(), max_epochs=3, check_val_every_n_epoch=2)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert [lines[0], lines[2]] == [f"epoch 1: {losses[0]}", f"epoch 3: {losses[2]}"]
    assert lines[1].startswith("epoch 2: held-out perplexity")


def test_the_run_directory_is_locked_while_it_trains(train: Callable[..., L.Trainer], tmp_path: Path) -> None:
    """The lock is released at the end, also after an error."""
    lock = tmp_path / "run" / ".lock"
    owners: list[int] = []

    class Look(L.Callback):
        def __init__(self, fails: bool) -> None:
            self.fails = fails

        def on_train_batch_end(self, *_: Any) -> None:
            owners.append(json.loads(lock.read_text())["pid"])
            if self.fails:
                raise ZeroDivisionError

    train(Look(fails=False), max_epochs=1)
    assert not lock.exists()
    with pytest.raises(ZeroDivisionError):
        train(Look(fails=True), max_epochs=1)
    assert not lock.exists()
    assert owners == [os.getpid()] * 4


def test_a_stop_inside_an_epoch_writes_a_resume_point_and_prints_its_position(
    train: Callable[..., L.Trainer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three updates an epoch: the fourth is the first of epoch 2. The resumed run equals an uninterrupted one."""
    options: dict[str, Any] = {"enable_checkpointing": True}
    stopped = train(RoundCheckpoint(0), max_steps=4, **options)
    printed = capsys.readouterr().out
    assert "epoch 1: " in printed
    assert "epoch 2: " not in printed
    where = "Stopped inside epoch 2 at update 4, after 1 of its 3 micro-batches."
    assert f"{where} `trainer.max_steps` is reached: increase it to continue." in printed
    assert stopped.max_steps == 4  # the Trainer's option is restored
    saved = tmp_path / "run" / "checkpoints" / "update-00000004.ckpt"
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").resolve() == saved
    resumed = train(RoundCheckpoint(0), ckpt_path=str(saved), **options)
    assert "epoch 2: held-out" in capsys.readouterr().out
    whole = train(RoundCheckpoint(0), **options)
    assert resumed.global_step == whole.global_step == 6
    expected = whole.lightning_module.state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in resumed.lightning_module.state_dict().items())


def test_a_metric_that_needs_held_out_rows_is_refused_without_them(
    train: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"val/loss.*set `data\.val_conversations`") as error:
        train(EarlyStopping("val/loss"), held_out=0)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
    train(EarlyStopping("val/loss"), max_epochs=1)


def test_a_run_that_ends_early_prints_why_and_how_it_can_continue(
    train: Callable[..., L.Trainer], capsys: pytest.CaptureFixture[str]
) -> None:
    early = EarlyStopping("val/loss", patience=1, min_delta=1e9)
    train(early, max_epochs=5)
    printed = capsys.readouterr().out
    assert (
        "Stopped after epoch 2 of 5, at update 6. A callback or a limit of the Trainer ended the run. The next"
        in printed
    )
    train(max_epochs=5, max_steps=4)
    printed = capsys.readouterr().out
    assert "at update 4, after 1 of its 3 micro-batches. No resume point was written." in printed
