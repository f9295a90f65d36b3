"""Checkpoint files: written atomically, and what can be told about one without loading it."""

import os
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from rlhf_pl.disk import write_atomically
from rlhf_pl.errors import InputError

FOLDER = "checkpoints"
SUPERSEDED = "superseded"


@dataclass(frozen=True, order=True)
class Progress:
    """How far the run was when a checkpoint was written.

    Args:
        global_step: Optimizer updates.
        rounds_done: Rounds whose training was finished.
        inside_round: Whether the next round's training had begun.
    """

    global_step: int
    rounds_done: int
    inside_round: bool


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, flushes, renames: a checkpoint that is there is whole. No second copy in memory."""

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
    """The run's own resume points, in no particular order."""
    folder = Path(run_dir) / FOLDER
    return [f for f in folder.glob("*.ckpt") if f.name.startswith(("after-round-", "update-")) and not f.is_symlink()]


def is_whole(file: Path) -> bool:
    """Whether every record of a checkpoint matches the checksum that torch wrote with it."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError, EOFError):
        return False


def read_progress(file: Path) -> Progress | None:
    """What a checkpoint is of; None if it can't be read.

    Raises:
        InputError: It holds objects that can't be loaded safely.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        epochs = content["loops"]["fit_loop"]["epoch_progress"]["current"]
        return Progress(content["global_step"], epochs["processed"], epochs["started"] > epochs["processed"])
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError, AttributeError):
        return None
    except pickle.UnpicklingError as error:
        if not zipfile.is_zipfile(file):
            return None
        raise InputError(
            f"{file} holds objects that can't be loaded safely: a callback's `state_dict` must hold plain values and "
            f"tensors only. {str(error).splitlines()[0]}"
        ) from error


def progress_of_files(run_dir: str | Path) -> dict[Path, Progress]:
    """The readable resume points of a run, oldest first."""
    found = {file: progress for file in checkpoint_files(run_dir) if (progress := read_progress(file)) is not None}
    return dict(sorted(found.items(), key=lambda item: (item[1], item[0].stat().st_mtime)))


def link_last(file: Path) -> None:
    """Point `last.ckpt` to `file`, in one step."""
    temporary = file.with_name(".last.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(file.name)
    os.replace(temporary, file.with_name("last.ckpt"))


def supersede(files: list[Path]) -> Path | None:
    """Put checkpoints of a training that is done again aside; only the newest is kept. Returns where it is."""
    if not files:
        return None
    folder = files[-1].parent / SUPERSEDED
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.ckpt"):
        old.unlink()
    for file in files[:-1]:
        file.unlink()
    kept = folder / files[-1].name
    os.replace(files[-1], kept)
    return kept
