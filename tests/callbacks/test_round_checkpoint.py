"""Resume points: which exist at any time, what they contain, and that the newest one is found."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel

from rlhf_pl.callbacks import RoundCheckpoint, round_checkpoint
from rlhf_pl.checkpointing.checkpoints import checkpoint_files, link_last
from rlhf_pl.rounds import disk_space
from rlhf_pl.utils.errors import InputError
from tests.callbacks.conftest import SmallRun
from tests.integration.test_fit import assert_same, weights

Again = Callable[..., Any]


class Listing(L.Callback):
    """Lists `checkpoints/` before every update but the first of a round, and after every round."""

    def __init__(self) -> None:
        self.found: list[tuple[str, list[str], str]] = []

    def list_files(self, trainer: L.Trainer, when: str) -> None:
        folder = Path(trainer.default_root_dir) / "checkpoints"
        names = sorted(f.name for f in folder.iterdir() if f.name != "last.ckpt") if folder.exists() else []
        last = (folder / "last.ckpt").resolve().name if names else ""
        self.found.append((when, names, last))

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx > 0:
            self.list_files(trainer, f"update {trainer.global_step}")

    def on_validation_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.list_files(trainer, f"round trained at {trainer.global_step}")

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.current_epoch > 0:
            self.list_files(trainer, f"round {trainer.current_epoch}")


def expected_files(updates: list[int], every: int, keep: int) -> list[tuple[str, list[str], str]]:
    """By the rules: an update's checkpoint replaces the previous one's; after a round only the rounds' stay.

    Until the next update the newest round's has the one before it beside it, and at the end `keep` are left.
    """
    listed, rounds, step = [], [], 0
    for number, count in enumerate(updates, 1):
        newest: list[str] = []
        for position in range(1, count + 1):
            step += 1
            is_last = position == count
            if is_last or (every and step % every == 0):
                newest = [f"update-{step:08d}.ckpt"]
                rounds = rounds[-keep if keep > 0 else None :]
            names = rounds + newest
            listed.append((f"round trained at {step}" if is_last else f"update {step}", names, (names or [""])[-1]))
        is_end = number == len(updates)
        count_kept = keep if is_end else max(keep, 2)
        rounds = [*rounds, f"after-round-{number:04d}.ckpt"][-count_kept if keep > 0 else None :]
        listed.append(("end" if is_end else f"round {number}", rounds, rounds[-1]))
    return listed


@pytest.mark.parametrize(("every", "keep"), [(1, 1), (2, 2), (0, -1)])
def test_the_files_at_any_time(tmp_path: Path, every: int, keep: int) -> None:
    listing = Listing()
    trainer = L.Trainer(
        accelerator="cpu", default_root_dir=tmp_path, max_epochs=3, limit_train_batches=4, limit_val_batches=1,
        num_sanity_val_steps=0, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[RoundCheckpoint(every, keep), listing],
    )  # fmt: skip
    trainer.fit(BoringModel())
    listing.list_files(trainer, "end")
    assert listing.found == expected_files([4, 4, 4], every, keep)


@pytest.mark.parametrize(("every", "keep"), [(1, 1), (0, 1), (2, 2), (1, 3), (0, -1)])
def test_the_disk_check_counts_the_checkpoints_that_a_round_adds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int, keep: int
) -> None:
    """Those that exist together at the most, before an old one is deleted, beyond those at the round's start."""
    starts, peaks, planned = [], [0] * 4, []

    class Start(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
            starts.append(len(checkpoint_files(tmp_path)))
            planned.append(disk_space._new_checkpoints(trainer, tmp_path, trainer.current_epoch))

    def count(file: Path) -> None:
        peaks[len(starts) - 1] = max(peaks[len(starts) - 1], len(checkpoint_files(tmp_path)))
        link_last(file)

    monkeypatch.setattr(round_checkpoint, "link_last", count)
    L.Trainer(
        accelerator="cpu", default_root_dir=tmp_path, max_epochs=4, limit_train_batches=3, limit_val_batches=0,
        logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[RoundCheckpoint(every, keep), Start()],
    ).fit(BoringModel())  # fmt: skip
    assert planned == [peak - start for peak, start in zip(peaks, starts, strict=True)]
    assert planned == ([2, 2, 1, 1] if keep == 1 else [2, 2, 2, 2])


def test_the_checkpoint_before_a_damaged_one_is_kept_at_the_end(
    again: Again, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Damage(L.Callback):
        """Flips a bit of the newest checkpoint once all of training is over."""

        def on_fit_end(self, trainer: L.Trainer, *_: Any) -> None:
            file = tmp_path / "run" / "checkpoints" / "after-round-0002.ckpt"
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content)

    again(RoundCheckpoint(), Damage(), max_epochs=2, enable_checkpointing=True)
    left = sorted(file.name for file in (tmp_path / "run" / "checkpoints").glob("after-*"))
    assert left == ["after-round-0001.ckpt", "after-round-0002.ckpt"]
    assert "after-round-0002.ckpt is damaged; the checkpoints before it are kept" in capsys.readouterr().out


def test_all_rounds_can_be_kept(run: SmallRun) -> None:
    names = sorted(file.name for file in (run.folder / "checkpoints").iterdir())
    assert names == ["after-round-0001.ckpt", "after-round-0002.ckpt", "last.ckpt"]
    assert (run.folder / "checkpoints" / "last.ckpt").resolve().name == "after-round-0002.ckpt"


def test_a_checkpoint_has_the_policy_and_its_position(run: SmallRun) -> None:
    for number, expected in ((1, run.seen[1]), (2, run.seen[2])):
        saved = torch.load(run.folder / "checkpoints" / f"after-round-000{number}.ckpt", weights_only=True)
        assert (saved["global_step"], saved["epoch"]) == (sum(run.updates[:number]), number - 1)
        held = {name.removeprefix("policy.lm."): tensor for name, tensor in saved["state_dict"].items()}
        assert_same({name: held[name] for name in expected if name in held}, {n: expected[n] for n in held})
        assert len(held) >= len(expected) - 1  # tied embeddings may be saved once


class EndCounter(L.Callback):
    """Counts the ends of rounds."""

    def __init__(self) -> None:
        self.seen = 0

    def on_train_epoch_end(self, *_: Any) -> None:
        self.seen += 1

    def state_dict(self) -> dict[str, int]:
        return {"seen": self.seen}


def test_a_rounds_checkpoint_has_the_states_of_other_callbacks_after_the_round(again: Again, tmp_path: Path) -> None:
    """In any order of the callbacks, and also of Lightning's own."""
    best = ModelCheckpoint(tmp_path / "best", monitor="train/round_loss", save_top_k=2)
    again(RoundCheckpoint(keep_rounds=-1), EndCounter(), best, max_epochs=2, enable_checkpointing=True)
    for number in (1, 2):
        file = tmp_path / "run" / "checkpoints" / f"after-round-000{number}.ckpt"
        states = torch.load(file, weights_only=True)["callbacks"]
        assert states["EndCounter"] == {"seen": number}
        (state,) = (state for key, state in states.items() if "ModelCheckpoint" in key)
        assert len(state["best_k_models"]) == number
    assert state["best_model_path"] == best.best_model_path


def test_a_run_resumed_from_any_checkpoint_ends_with_the_same_weights(
    run: SmallRun, again: Again, tmp_path: Path
) -> None:
    class Stop(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 2:
                raise KeyError("power cut")

    with pytest.raises(KeyError):
        again(RoundCheckpoint(1), Stop(), max_epochs=2, enable_checkpointing=True)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert last.resolve().name == "update-00000002.ckpt"
    _, module = again(RoundCheckpoint(1), max_epochs=2, enable_checkpointing=True, ckpt_path=str(last))
    assert_same(weights(module), run.seen[-1])


def test_what_a_killed_process_left_half_written_is_removed(again: Again, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    (folder / ".update-00000009.ckpt.tmp").mkdir(parents=True)
    (folder / ".last.ckpt.tmp").write_bytes(b"half")
    again(RoundCheckpoint(), enable_checkpointing=True)
    assert sorted(file.name for file in folder.iterdir()) == ["after-round-0001.ckpt", "last.ckpt"]


class Secretive(BoringModel):
    """A user's module whose hyperparameters contain a key."""

    def __init__(self, api_key: str, width: int) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_a_users_own_trainer_and_module_are_saved_without_their_secrets(tmp_path: Path) -> None:
    trainer = L.Trainer(
        accelerator="cpu", default_root_dir=tmp_path, max_epochs=1, limit_train_batches=3, limit_val_batches=0,
        logger=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[RoundCheckpoint(2)],
    )  # fmt: skip
    module = Secretive("sk-123456789", width=3)
    trainer.fit(module)
    saved = torch.load((tmp_path / "checkpoints" / "last.ckpt").resolve(), weights_only=True)
    assert saved["hyper_parameters"]["width"] == 3
    assert "sk-123456789" not in json.dumps(saved["hyper_parameters"])
    assert_same(saved["state_dict"], dict(module.state_dict()))
    assert saved["global_step"] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_updates": -1}, r"`checkpoint\.every_n_updates` must be 0 \(never\) or more, got -1"),
        ({"keep_rounds": 0}, r"`checkpoint\.keep_rounds` must be -1 \(all\), or 1 or more, got 0"),
    ],
)
def test_wrong_options_are_refused_at_construction(options: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RoundCheckpoint(**options)
