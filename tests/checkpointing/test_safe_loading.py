"""No pickle in a checkpoint runs, in files and sharded folders, in any of Lightning's ways to load them."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint import FileSystemReader, load, save

from rlhf_pl import CPUFSDPStrategy, FSDP2Strategy
from rlhf_pl.checkpointing.checkpoints import CONTENTS, META, is_whole, read_progress, read_weights
from rlhf_pl.checkpointing.safe_loading import (
    DamagedError,
    UnsafeError,
    check_checkpoint,
    check_folder,
    guard_loads,
    unguard_loads,
)
from rlhf_pl.modules import SFTModule
from rlhf_pl.utils.errors import InputError
from tests import pickles

STATE = {
    "state_dict": {"policy.lm.w": torch.arange(12.0).view(3, 4), "policy.lm.half": torch.ones(2, dtype=torch.bfloat16)},
    "optimizer_0": {"lr": 0.125, "betas": [0.9, 0.99]},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sharded checkpoint as FSDP2 writes it, with two tensors and byte entries."""
    path = tmp_path / "after-round-0001.ckpt"
    save(STATE, checkpoint_id=path, no_dist=True)
    epochs = {"current": {"processed": 1, "started": 1}}
    torch.save({"global_step": 3, "loops": {"fit_loop": {"epoch_progress": epochs}}}, path / META)
    return write_sizes(path)


def write_sizes(path: Path) -> Path:
    """Write the list of sizes, as an attacker could."""
    sizes = {f.name: f.stat().st_size for f in path.iterdir() if f.name != CONTENTS}
    (path / CONTENTS).write_text(json.dumps(sizes))
    return path


def put_entry(folder: Path, name: str, content: bytes) -> None:
    """Replace an entry's bytes, and update `.metadata`."""
    metadata = FileSystemReader(folder).read_metadata()
    index = next(i for i in metadata.storage_data if i.fqn == name)
    part = folder / metadata.storage_data[index].relative_path
    metadata.storage_data[index].offset = part.stat().st_size
    metadata.storage_data[index].length = len(content)
    part.write_bytes(part.read_bytes() + content)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def plant_in_metadata(folder: Path, mark: Path) -> None:
    (folder / ".metadata").write_bytes(pickles.make_pickle(mark))


def plant_beside_metadata(folder: Path, mark: Path) -> None:
    (folder / "__0.metadata").write_bytes(pickles.make_pickle(mark))


def plant_inside_metadata(folder: Path, mark: Path) -> None:
    metadata = FileSystemReader(folder).read_metadata()
    metadata.planner_data = pickles.make_evil_object(mark)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def plant_in_bytes(folder: Path, mark: Path) -> None:
    put_entry(folder, "optimizer_0.lr", pickles.make_torch(mark))


def plant_as_raw_bytes(folder: Path, mark: Path) -> None:
    put_entry(folder, "optimizer_0.lr", pickles.make_pickle(mark))


def plant_in_meta(folder: Path, mark: Path) -> None:
    (folder / META).write_bytes(pickles.make_torch(mark, torch.load(folder / META)))


PLANTS = [
    plant_in_metadata,
    plant_beside_metadata,
    plant_inside_metadata,
    plant_in_bytes,
    plant_as_raw_bytes,
    plant_in_meta,
]


def test_a_valid_folder_is_read_as_torch_reads_it(folder: Path) -> None:
    names = set(check_folder(folder).state_dict_metadata)
    assert names == set(FileSystemReader(folder).read_metadata().state_dict_metadata)
    assert is_whole(folder)
    check_checkpoint(folder)
    found = read_weights(folder, "policy.lm.", {"w": torch.zeros(3, 4), "half": torch.zeros(2, dtype=torch.bfloat16)})
    assert torch.equal(found["w"], STATE["state_dict"]["policy.lm.w"])
    assert torch.equal(found["half"], STATE["state_dict"]["policy.lm.half"])


@pytest.mark.parametrize("plant", PLANTS)
def test_a_folder_with_a_pickle_is_refused_and_nothing_runs(
    folder: Path, tmp_path: Path, plant: Callable[[Path, Path], None]
) -> None:
    mark = tmp_path / "ran"
    plant(folder, mark)
    write_sizes(folder)
    with pytest.raises(InputError, match="loaded safely" if plant is not plant_as_raw_bytes else "read|safely"):
        check_checkpoint(folder)
    assert not mark.exists()


def test_torch_itself_would_run_them(folder: Path, tmp_path: Path) -> None:
    """The planted pickles work."""
    mark = tmp_path / "ran"
    plant_in_bytes(folder, mark)
    load({"optimizer_0": {"lr": 0.0}}, checkpoint_id=folder, no_dist=True)
    assert mark.exists()
    mark.unlink()
    plant_in_metadata(folder, mark)
    FileSystemReader(folder).read_metadata()
    assert mark.exists()


def test_a_tensor_that_is_bytes_in_the_metadata_is_not_unpickled(folder: Path, tmp_path: Path) -> None:
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    mark = tmp_path / "ran"
    put_entry(folder, "state_dict.policy.lm.w", pickles.make_torch(mark))
    metadata = FileSystemReader(folder).read_metadata()
    metadata.state_dict_metadata["state_dict.policy.lm.w"] = BytesStorageMetadata()
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UnsafeError):
        read_weights(folder, "policy.lm.", {"w": torch.zeros(3, 4)})
    assert not mark.exists()


def test_a_part_outside_of_the_folder_is_refused(folder: Path) -> None:
    metadata = FileSystemReader(folder).read_metadata()
    next(iter(metadata.storage_data.values())).relative_path = "../elsewhere.distcp"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UnsafeError, match="elsewhere"):
        check_folder(folder)


@pytest.mark.parametrize("content", [b"", b"garbage" * 99, pickle.dumps({"a": 1}), pickle.dumps([1] * 1000)[:-9]])
def test_damaged_metadata_is_damage(folder: Path, content: bytes) -> None:
    (folder / ".metadata").write_bytes(content)
    write_sizes(folder)
    assert not is_whole(folder)
    with pytest.raises(DamagedError, match=r"\.metadata"):
        check_folder(folder)


class _Tiny(SFTModule):
    """A module of this package without a model, so that only Lightning loads files."""

    def setup(self, stage: str) -> None:
        guard_loads(self.trainer)

    def configure_model(self) -> None:
        if not hasattr(self, "layer"):
            self.layer = torch.nn.Linear(1, 1)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_train_start(self) -> None: ...
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None: ...


@pytest.mark.parametrize("stage", ["fit", "validate"])
@pytest.mark.parametrize("form", ["zip", "raw", "folder"])
def test_trainers_in_python_load_no_pickle(tmp_path: Path, folder: Path, stage: str, form: str) -> None:
    mark, file = tmp_path / "ran", tmp_path / "x.ckpt"
    if form == "folder":
        plant_in_metadata(folder, mark)
        file = folder
    else:
        file.write_bytes(pickles.make_torch(mark, {"state_dict": {}}) if form == "zip" else pickles.make_pickle(mark))
    trainer = L.Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
                        enable_progress_bar=False, default_root_dir=tmp_path)  # fmt: skip
    loader = torch.utils.data.DataLoader(torch.zeros(1, 1))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=str(file)):
        getattr(trainer, stage)(_Tiny("nowhere"), loader, ckpt_path=str(file))
    assert not mark.exists()


@pytest.mark.parametrize("kind", [CPUFSDPStrategy, FSDP2Strategy])
def test_our_strategies_load_no_pickle(tmp_path: Path, folder: Path, kind: type) -> None:
    mark = tmp_path / "ran"
    plant_in_metadata(folder, mark)
    run: Any = SimpleNamespace(strategy=kind())
    guard_loads(run)
    with pytest.raises(InputError, match=str(folder)):
        run.strategy.load_checkpoint(folder)
    assert not mark.exists()


def test_a_trainers_checkpoint_io_is_restored(tmp_path: Path) -> None:
    """Checkpoints of another module may hold objects that its user allows to load."""
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                        limit_train_batches=1, max_epochs=1, default_root_dir=tmp_path)  # fmt: skip
    plain = trainer.strategy.checkpoint_io
    trainer.fit(_Tiny("nowhere"), torch.utils.data.DataLoader(torch.zeros(0, 1)))  # type: ignore[arg-type]
    assert trainer.strategy.checkpoint_io is plain


def test_load_from_checkpoint_loads_no_pickle(tmp_path: Path) -> None:
    mark, file = tmp_path / "ran", tmp_path / "x.ckpt"
    file.write_bytes(pickles.make_torch(mark, {"state_dict": {}}))
    with pytest.raises(pickle.UnpicklingError):
        _Tiny.load_from_checkpoint(file, policy="nowhere")
    assert not mark.exists()


@pytest.mark.parametrize("form", ["zip", "raw", "array"])
def test_a_resume_point_that_is_a_pickle_is_refused_or_skipped(tmp_path: Path, form: str) -> None:
    mark, file = tmp_path / "ran", tmp_path / "update-00000001.ckpt"
    file.write_bytes({"zip": pickles.make_torch, "raw": pickles.make_pickle, "array": pickles.make_npy}[form](mark))
    if form == "zip":
        with pytest.raises(UnsafeError, match=str(file)):
            read_progress(file)
    else:
        assert read_progress(file) is None
    assert not mark.exists()


def test_lightnings_own_sharding_strategies_get_their_checkpoint_checked(tmp_path: Path) -> None:
    """They load without a CheckpointIO, so the checkpoint that a fit goes on from is checked in `setup`."""
    mark = tmp_path / "mark"
    file = tmp_path / "planted.ckpt"
    file.write_bytes(pickles.make_pickle(mark))
    trainer = L.Trainer(strategy=ModelParallelStrategy(), accelerator="cpu", devices=1, logger=False)
    load = trainer.strategy.load_checkpoint
    guard_loads(trainer)  # nothing to go on from
    trainer.ckpt_path = str(file)
    with pytest.raises(InputError, match=r"planted\.ckpt"):
        guard_loads(trainer)
    unguard_loads(trainer)
    assert trainer.strategy.load_checkpoint == load
    assert not mark.exists()
