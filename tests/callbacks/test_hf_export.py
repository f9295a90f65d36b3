"""Exported folders: after which rounds, with which weights, and complete even after damage or a killed run."""

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.demos.boring_classes import BoringModel
from safetensors.torch import load_file

from rlhf_pl.__main__ import main
from rlhf_pl.callbacks import HFExport, RoundCheckpoint
from rlhf_pl.models.export_stamp import STAMP, find_damaged_files, find_exports
from rlhf_pl.models.rounding import round_to
from rlhf_pl.optim import AdamW
from rlhf_pl.utils.errors import InputError
from tests.callbacks.conftest import SmallRun
from tests.integration.test_fit import PROMPTS, assert_same, fit
from tests.modules.test_export import assert_same_folder, checkpoint, save_in

Again = Callable[..., Any]


def exported(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_exports(folder: Path, weights: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> None:
    """Check that a folder has the policy's weights in a dtype; tied ones are written once."""
    found = exported(folder)
    assert_same(found, {name: round_to(weights[name], dtype) for name in found})
    assert set(weights) - set(found) <= {"lm_head.weight"}


def test_a_model_after_every_round_and_one_at_the_end(run: SmallRun) -> None:
    """Each has the policy's weights of its round, and a stamp with the update."""
    for name, weights, update in (
        ("model-round-1", run.seen[1], run.updates[0]),
        ("model-round-2", run.seen[2], sum(run.updates)),
        ("model", run.seen[2], sum(run.updates)),
    ):
        assert_exports(run.folder / name, weights)
        stamp = json.loads((run.folder / name / STAMP).read_text())
        assert (stamp["updates"], stamp["dtype"]) == (update, "float32")
    assert sorted(path.name for path in find_exports(run.folder)) == ["model", "model-round-1", "model-round-2"]
    assert exported(run.folder / "model-round-1")["model.norm.weight"].ne(run.seen[0]["model.norm.weight"]).any()


def test_another_folder_and_dtype(run: SmallRun, again: Again, tmp_path: Path) -> None:
    again(HFExport("final/half", dtype="bfloat16"), max_epochs=2)
    assert_exports(tmp_path / "run" / "final" / "half", run.seen[2], torch.bfloat16)
    assert not (tmp_path / "run" / "model").exists()


def test_an_unfinished_round_has_no_model(again: Again, tmp_path: Path) -> None:
    trainer, module = again(HFExport(dtype="float32", every_round=True), max_steps=1)
    assert trainer.global_step == 1
    assert [path.name for path in find_exports(tmp_path / "run")] == ["model"]
    assert_exports(tmp_path / "run" / "model", dict(module.weights().stream()))


def test_an_existing_export_is_not_written_again(again: Again, tmp_path: Path) -> None:
    """A finished run that is started again leaves the files unchanged; new weights replace them."""
    options: dict[str, Any] = {"enable_checkpointing": True}
    again(HFExport(), RoundCheckpoint(), **options)
    model = tmp_path / "run" / "model"
    before = {file.name: file.stat().st_mtime_ns for file in model.iterdir()}
    old = exported(model)["model.norm.weight"]
    last = str((tmp_path / "run" / "checkpoints" / "last.ckpt").resolve())
    again(HFExport(), RoundCheckpoint(), ckpt_path=last, **options)
    assert {file.name: file.stat().st_mtime_ns for file in model.iterdir()} == before
    again(HFExport(), RoundCheckpoint(), ckpt_path=last, max_epochs=2, **options)
    assert exported(model)["model.norm.weight"].ne(old).any()
    assert not list((tmp_path / "run").glob(".model.*"))


def test_modules_that_cannot_be_exported_are_refused_before_training(tmp_path: Path) -> None:
    trainer = L.Trainer(
        accelerator="cpu", default_root_dir=tmp_path / "run", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[HFExport()],
    )  # fmt: skip
    with pytest.raises(InputError, match="HFExport works with this package's modules, got BoringModel"):
        trainer.fit(BoringModel())
    assert trainer.global_step == 0


@pytest.mark.parametrize("folder", [".", "", "..", "/tmp/x", "checkpoints", "rounds/x", "a/../.."])
def test_folders_outside_the_run_or_in_use_are_refused(folder: str) -> None:
    with pytest.raises(InputError, match=r"`export.folder`"):
        HFExport(folder=folder)


def test_a_runs_export_equals_the_folder_of_save_pretrained(tmp_path: Path, write_jsonl: Any) -> None:
    """Trained in bf16-mixed from bfloat16 with lr 0: identical tensors, files and modes, also after another stage."""
    source = checkpoint(tmp_path / "source", "LlamaConfig", torch.bfloat16)
    saved = save_in(source, tmp_path / "saved", torch.bfloat16)
    prompts = write_jsonl(PROMPTS)
    module = {"optimizer": lambda p: AdamW(p, lr=0.0)}
    mask = os.umask(0o027)
    try:
        run = tmp_path / "run"
        settings: dict[str, Any] = {"max_epochs": 1, "precision": "bf16-mixed"}
        fit(run, source, prompts, [HFExport()], module, **settings)
    finally:
        os.umask(mask)
    assert_same_folder(run / "model", saved)
    assert {stat.S_IMODE(file.stat().st_mode) for file in (run / "model").iterdir()} == {0o640}
    fit(tmp_path / "next", run / "model", prompts, [HFExport()], module, **settings)
    assert_same_folder(tmp_path / "next" / "model", saved)

    shutil.rmtree(run / "model")
    (run / "model").mkdir()
    (run / "model" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="not an export of this program"):
        fit(run, source, prompts, [HFExport()], module, **settings)
    assert (run / "model" / "thesis.txt").exists()


def test_a_damaged_export_is_detected_and_written_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Truncated files are detected by size, changed bytes by checksum; the same run writes the same folder again."""
    source, run = checkpoint(tmp_path / "source", "LlamaConfig", torch.bfloat16), tmp_path / "run"
    rows = [{"prompt": f"What is {i}?", "response": f"It is {i}."} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [
        *("fit", "--model=SFTModule", f"--model.policy={source}", "--data=SFTDataModule", "--data.max_tokens=64"),
        *(f"--data.conversations={tmp_path / 'rows.jsonl'}", "--data.batch_size=2", "--trainer.max_epochs=1"),
        *("--trainer.accelerator=cpu", f"--trainer.default_root_dir={run}", "--trainer.enable_progress_bar=false"),
    ]
    assert main(arguments) == 0
    model = run / "model"
    whole = {f.name: f.read_bytes() for f in model.iterdir()}
    written = json.loads(whole[STAMP])["files"]
    assert written.keys() == whole.keys() - {STAMP}
    name = "model.safetensors"
    assert written[name] == {"size": len(whole[name]), "sha256": hashlib.sha256(whole[name]).hexdigest()}
    assert main(["rounds", str(run), "--verify"]) == 0

    def truncate(file: Path) -> None:
        file.write_bytes(file.read_bytes()[:-1])

    def flip(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)

    for file, damage in (
        (name, truncate),
        (name, flip),
        ("tokenizer.json", truncate),
        ("config.json", Path.unlink),
        (STAMP, truncate),
    ):
        damage(model / file)
        assert [f.name for f in find_damaged_files(model, checksums=True)] == [file]
        assert bool(find_damaged_files(model, checksums=False)) == (damage is not flip)
        assert list(find_exports(run)) == [model]
        capsys.readouterr()
        assert main(["rounds", str(run), "--verify"]) == 1
        assert file in capsys.readouterr().out.replace("\n", "")
        assert main(arguments) == 0
        assert {f.name: f.read_bytes() for f in model.iterdir()} == whole


def test_a_damaged_model_of_a_round_is_written_again(tmp_path: Path) -> None:
    """The last round's by the same command, an earlier one's from its checkpoint in another run directory."""
    source, run = checkpoint(tmp_path / "source", "LlamaConfig", torch.bfloat16), tmp_path / "run"
    rows = [{"prompt": f"What is {i}?", "response": f"It is {i}."} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [
        *("fit", "--model=SFTModule", f"--model.policy={source}", "--data=SFTDataModule", "--data.max_tokens=64"),
        *(f"--data.conversations={tmp_path / 'rows.jsonl'}", "--data.batch_size=2", "--export.every_round=true"),
        *("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--model.optimizer.lr=0.01"),
        "--checkpoint.keep_rounds=2",
    ]
    common = [*arguments, "--trainer.max_epochs=2", f"--trainer.default_root_dir={run}"]
    assert main(common) == 0
    first, last = (run / f"model-round-{n}" / "model.safetensors" for n in (1, 2))
    before, wanted = first.read_bytes(), last.read_bytes()
    assert before != wanted
    first.write_bytes(before[:-1])
    last.write_bytes(wanted[:-1])
    assert main(common) == 0
    assert last.read_bytes() == wanted
    assert main(["rounds", str(run), "--verify"]) == 1  # the first round's
    other = ["--trainer.max_epochs=1", f"--trainer.default_root_dir={tmp_path / 'other'}"]
    assert main([*arguments, *other, f"--ckpt_path={run}/checkpoints/after-round-0001.ckpt"]) == 0
    assert (tmp_path / "other" / "model" / "model.safetensors").read_bytes() == before


def test_averaged_weights_are_exported(tmp_path: Path, llama: Path, write_jsonl: Callable[..., str]) -> None:
    """e <- 0.5 e + 0.5 w after every update, from the first update's weights on; a run started again exports them."""
    seen: list[torch.Tensor] = []
    prompts = write_jsonl(PROMPTS)

    class Recorder(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
            if trainer.global_step > len(seen):
                seen.append(next(t for n, t in module.weights().stream() if n.endswith("0.mlp.up_proj.weight")).clone())

    def run(**more: Any) -> dict[str, torch.Tensor]:
        callbacks = [Recorder(), EMAWeightAveraging(decay=0.5), RoundCheckpoint(), HFExport(dtype="float32")]
        fit(tmp_path, llama, prompts, callbacks, enable_checkpointing=True, **more)
        return load_file(tmp_path / "model" / "model.safetensors")

    first = run()
    average = seen[0]
    for later in seen[1:]:
        average = 0.5 * average + 0.5 * later
    assert torch.allclose(first["model.layers.0.mlp.up_proj.weight"], average, atol=1e-6)
    assert not torch.allclose(average, seen[-1], atol=1e-6)
    assert_same(first, run(ckpt_path=str(tmp_path / "checkpoints" / "last.ckpt")))
