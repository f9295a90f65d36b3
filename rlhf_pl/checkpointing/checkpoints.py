"""Checkpoint files: atomic writes, and information about a checkpoint without loading it."""

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor

from rlhf_pl.checkpointing.safe_loading import META, DamagedError, check_folder, make_unsafe_error, read_metadata
from rlhf_pl.distributed.ranks import Ranks
from rlhf_pl.utils.disk import sync_folder, translate_full_disk, write_atomically
from rlhf_pl.utils.errors import InputError

FOLDER = "checkpoints"
SUPERSEDED = "superseded"
CONTENTS = "files.json"
RUN = "rlhf_pl_run"  # a checkpoint's key for the run whose rounds it was trained on


@dataclass(frozen=True, order=True)
class Progress:
    """Progress of the run when a checkpoint was written.

    Args:
        global_step: Optimizer updates.
        rounds_done: Rounds whose training was finished.
        is_inside_round: Whether the next round's training had begun.
        has_ended_round: Whether the steps after a round's last update (validation, evaluation, hooks) were done.
        run: Id of the run; None in checkpoints of earlier versions.
    """

    global_step: int
    rounds_done: int
    is_inside_round: bool
    has_ended_round: bool = True
    run: str | None = field(default=None, compare=False)


def is_sharded_checkpoint(path: Path) -> bool:
    """Whether a checkpoint is a folder with a part from each rank."""
    return path.is_dir()


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically, without a second copy in memory."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        target = Path(os.path.abspath(path))
        write_atomically(target, lambda file: torch.save(checkpoint, file), _tensor_bytes(checkpoint))


def _tensor_bytes(content: Any) -> int:
    if isinstance(content, torch.Tensor):
        return content.numel() * content.element_size()
    if isinstance(content, dict):
        return sum(map(_tensor_bytes, content.values()))
    return sum(map(_tensor_bytes, content)) if isinstance(content, list | tuple) else 0


def checkpoint_files(run_dir: str | Path) -> list[Path]:
    """The resume points that the run has written, in any order."""
    folder = Path(run_dir) / FOLDER
    return [f for f in folder.glob("*.ckpt") if f.name.startswith(("after-round-", "update-")) and not f.is_symlink()]


def save_sharded(trainer: L.Trainer, target: Path, ranks: Ranks) -> None:
    """Write a sharded checkpoint atomically. Called by all ranks, which write their parts.

    `files.json` lists the folder's files with their sizes, so that a missing or truncated part is detected.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    ranks.run_on_rank_zero(lambda: shutil.rmtree(temporary, ignore_errors=True))
    with translate_full_disk(target):
        trainer.save_checkpoint(temporary)

        def commit() -> None:
            sizes = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
            write_atomically(temporary / CONTENTS, lambda file: file.write(json.dumps(sizes).encode()))
            with (temporary / META).open("rb") as file:
                os.fsync(file.fileno())
            shutil.rmtree(target, ignore_errors=True)
            os.replace(temporary, target)
            sync_folder(target.parent)

        ranks.run_on_rank_zero(commit)


def is_whole(file: Path) -> bool:
    """Whether all records of a checkpoint file match torch's checksums, or all files of a folder their sizes.

    Raises:
        UnsafeError: Loading the folder would run code.
    """
    try:
        if is_sharded_checkpoint(file):
            sizes: dict[str, int] = json.loads((file / CONTENTS).read_text())
            check_folder(file)
            return all((file / name).stat().st_size == size for name, size in sizes.items())
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, TypeError, AttributeError, DamagedError):
        return False


def read_progress(file: Path) -> Progress | None:
    """Progress of the run in a checkpoint; None if it can't be read.

    Raises:
        InputError: The checkpoint holds objects that can't be loaded safely.
    """
    part = file / META if is_sharded_checkpoint(file) else file
    try:
        content = torch.load(part, map_location="cpu", weights_only=True, mmap=True)
        loop = content["loops"]["fit_loop"]
        epochs = loop["epoch_progress"]["current"]
        steps, done, is_inside = content["global_step"], epochs["processed"], epochs["started"] > epochs["processed"]
        if is_inside and loop["epoch_loop.batch_progress"]["is_last_batch"]:
            return Progress(steps, done + 1, is_inside_round=False, has_ended_round=False, run=content.get(RUN))
        return Progress(steps, done, is_inside, run=content.get(RUN))
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError, AttributeError):
        return None
    except pickle.UnpicklingError as error:
        if not zipfile.is_zipfile(part):
            return None
        raise make_unsafe_error(part, error) from error


def get_weight_group(path: Path) -> str:
    """The key of a sharded checkpoint's weights: `model` from FSDP, `state_dict` from FSDP2.

    Raises:
        InputError: The checkpoint has no weights.
    """
    names = read_metadata(path).state_dict_metadata
    groups = {name.partition(".")[0] for name in names} & {"model", "state_dict"}
    if len(groups) != 1:
        raise DamagedError(f"{path} holds no weights in the format of FSDP or FSDP2. Resume from another checkpoint.")
    return groups.pop()


def check_readable(path: Path, trainer: L.Trainer) -> None:
    """Refuse a checkpoint in a format that the run's strategy can't read, before anything is loaded.

    Raises:
        InputError: The strategy can't read the checkpoint. The message names the one that can.
    """
    if not is_sharded_checkpoint(path):
        return
    fsdp = {"model": FSDPStrategy, "state_dict": ModelParallelStrategy}
    wanted = fsdp.get(get_weight_group(path))
    if wanted is not None and not isinstance(trainer.strategy, wanted):
        name = "fsdp" if wanted is FSDPStrategy else "fsdp2"
        raise InputError(
            f"{path} was written by --trainer.strategy {name} in parts, which `trainer.strategy` "
            f"{type(trainer.strategy).__name__} can't read. Resume with --trainer.strategy {name}, on one or more "
            "devices."
        )


def read_weights(file: Path, prefix: str, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Full tensors of a checkpoint, by name without `prefix`.

    Args:
        file: One file, or a folder with a part from each rank.
        prefix: Prefix in the LightningModule of the names to read.
        like: Expected names and shapes; used for folders only.
    """
    if not is_sharded_checkpoint(file):
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        state = content.get("current_model_state", content["state_dict"])  # if Lightning also saves averaged weights
        return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    from torch.distributed.checkpoint import FileSystemReader, load

    check_folder(file)
    reader, group = FileSystemReader(file), get_weight_group(file)
    wanted = {f"{group}.{prefix}{name}": torch.empty_like(t, device="cpu") for name, t in like.items()}
    load(wanted, storage_reader=reader, no_dist=True)
    return {name.removeprefix(f"{group}.{prefix}"): tensor for name, tensor in wanted.items()}


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint file or folder."""
    if is_sharded_checkpoint(path) and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def find_resume_files(run_dir: str | Path) -> dict[Path, Progress]:
    """The readable resume points of a run with their progress, oldest first."""
    found = {file: progress for file in checkpoint_files(run_dir) if (progress := read_progress(file)) is not None}
    return dict(sorted(found.items(), key=lambda item: (item[1], item[0].stat().st_mtime)))


def link_last(file: Path) -> None:
    """Make `last.ckpt` a link to `file`, atomically."""
    temporary = file.with_name(".last.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(file.name)
    os.replace(temporary, file.with_name("last.ckpt"))


def supersede(files: list[Path]) -> Path | None:
    """Move the newest checkpoint of a training that is repeated aside and delete the others. Returns its new path."""
    if not files:
        return None
    folder = files[-1].parent / SUPERSEDED
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.ckpt"):
        remove_checkpoint(old)
    for file in files[:-1]:
        remove_checkpoint(file)
    kept = folder / files[-1].name
    os.replace(files[-1], kept)
    return kept
