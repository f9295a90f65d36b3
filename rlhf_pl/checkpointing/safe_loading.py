"""Checks checkpoints before torch or Lightning loads them, so that no pickle in one can run code.

torch unpickles a sharded checkpoint's `.metadata` and its byte entries without restriction. Lightning's FSDP strategy
does the same with a whole file.
"""

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path, PosixPath, PurePosixPath, PureWindowsPath, WindowsPath
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch.distributed.checkpoint import CheckpointException, metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo

from rlhf_pl.distributed.strategies import CPUFSDPStrategy, FSDP2Strategy
from rlhf_pl.utils.errors import InputError, first_line

METADATA = ".metadata"
META = "meta.pt"  # file of a sharded checkpoint with everything except weights and optimizer
_CLASSES = (
    *(getattr(metadata, name) for name in metadata.__all__),
    metadata._MEM_FORMAT_ENCODING,
    _StorageInfo,
    torch.Size,
    OrderedDict,
    *(PosixPath, WindowsPath, PurePosixPath, PureWindowsPath),
)
_ALLOWED: dict[tuple[str, str], Any] = {(kind.__module__, kind.__qualname__): kind for kind in _CLASSES}
_ALLOWED |= {("pathlib", kind.__name__): kind for kind in _CLASSES[-4:]}  # their names before Python 3.13
_ALLOWED |= {("torch.serialization", "_get_layout"): torch.serialization._get_layout}
_ALLOWED |= {("torch", str(value).removeprefix("torch.")): value for value in vars(torch).values()
             if isinstance(value, torch.dtype)}  # fmt: skip


class UnsafeError(InputError):
    """A checkpoint holds more than plain values and tensors."""


class DamagedError(InputError):
    """A part of a checkpoint can't be read."""


class _Unpickler(pickle.Unpickler):
    """Creates only objects that torch writes to `.metadata`."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise UnsafeError(f"{module}.{name}")
        return _ALLOWED[module, name]


def read_metadata(folder: Path) -> metadata.Metadata:
    """Read the `.metadata` of a sharded checkpoint.

    Raises:
        UnsafeError: The file would run code.
        DamagedError: The file is missing, or torch did not write it.
    """
    found = [_unpickle(file) for file in (folder / METADATA, *sorted(folder.glob(f"__*{METADATA}")))]
    return found[0]  # torch reads the others, one per rank, if the ranks do not communicate


def _unpickle(file: Path) -> metadata.Metadata:
    try:
        content = _Unpickler(io.BytesIO(file.read_bytes())).load()
    except UnsafeError as error:
        raise make_unsafe_error(file, f"{error} is not one of torch's classes for it") from error
    except Exception as error:  # unpickling garbage raises exceptions of any class
        raise DamagedError(f"{file} can't be read: {first_line(error)}. Resume from another checkpoint.") from error
    if not isinstance(content, metadata.Metadata) or not isinstance(content.storage_data, dict):
        raise DamagedError(f"{file} is not the metadata of a sharded checkpoint. Resume from another one.")
    return content


def check_folder(folder: Path) -> metadata.Metadata:
    """Refuse a sharded checkpoint that would run code. Returns its metadata.

    Raises:
        UnsafeError: A file, named in the message, would run code.
        DamagedError: A file, named in the message, can't be read.
    """
    found = read_metadata(folder)
    for index, place in found.storage_data.items():
        name = str(place.relative_path)
        if Path(name).name != name or place.transform_descriptors:
            raise make_unsafe_error(folder / METADATA, f"it places {index.fqn} in {name!r}, or transforms it")
        if not isinstance(found.state_dict_metadata.get(index.fqn), metadata.TensorStorageMetadata):
            _check_bytes(folder / name, place)  # torch reads tensors with `weights_only`
    return found


def _check_bytes(file: Path, place: Any) -> None:
    """Read an entry as plain values, as torch would unpickle it without restriction."""
    try:
        with file.open("rb") as opened:
            opened.seek(place.offset)
            torch.load(io.BytesIO(opened.read(place.length)), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise make_unsafe_error(file, error) from error
    except Exception as error:  # zip errors of many kinds, too
        raise DamagedError(f"{file} can't be read: {first_line(error)}. Resume from another checkpoint.") from error


def check_checkpoint(path: Path) -> None:
    """Refuse a checkpoint file or folder that holds more than plain values and tensors.

    Raises:
        InputError: The message names the file and what it holds.
    """
    if path.is_dir():
        check_folder(path)
        path = path / META
    try:
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise make_unsafe_error(path, error) from error
    except Exception as error:  # zip errors of many kinds
        raise DamagedError(f"{path} is not a readable checkpoint: {first_line(error)}.") from error


def load_checked(load: Callable[..., Any], path: Any, **options: Any) -> Any:
    """Check a checkpoint, then load it with a function of Lightning's.

    Args:
        load: Takes the path, `options` and `weights_only`.
        path: A file or a folder. If it does not exist, `load` reports that.
        **options: Options of `load`.

    Raises:
        InputError: The checkpoint holds more than plain values and tensors, or can't be read.
    """
    if Path(path).exists():
        check_checkpoint(Path(path))
    try:
        return load(path, **options, weights_only=True)
    except (CheckpointException, pickle.UnpicklingError) as error:
        raise DamagedError(f"{path} can't be read: {first_line(error)}. Resume from another one.") from error


class CheckedCheckpointIO(CheckpointIO):
    """Wraps a Trainer's `CheckpointIO` and checks every checkpoint before it is loaded.

    Args:
        wrapped: Reads and writes the checkpoints.
    """

    def __init__(self, wrapped: CheckpointIO) -> None:
        self.wrapped = wrapped

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        self.wrapped.save_checkpoint(checkpoint, path, storage_options)

    def load_checkpoint(self, path: Any, map_location: Any | None = None, weights_only: bool | None = None) -> Any:
        options = {} if map_location is None else {"map_location": map_location}
        return load_checked(self.wrapped.load_checkpoint, path, **options)

    def remove_checkpoint(self, path: Any) -> None:
        self.wrapped.remove_checkpoint(path)

    def teardown(self) -> None:
        self.wrapped.teardown()


def guard_loads(trainer: L.Trainer) -> None:
    """Have a Trainer check every checkpoint before it loads it, until `unguard_loads`.

    Lightning's own FSDPStrategy and ModelParallelStrategy load without a CheckpointIO: the checkpoint to resume from is
    checked at once.

    Raises:
        InputError: That checkpoint holds more than plain values and tensors, or can't be read.
    """
    strategy = trainer.strategy
    if isinstance(strategy, CPUFSDPStrategy | FSDP2Strategy):
        strategy.load_with = load_checked
    elif isinstance(strategy, FSDPStrategy | ModelParallelStrategy):
        if trainer.ckpt_path is not None and Path(trainer.ckpt_path).exists():
            check_checkpoint(Path(trainer.ckpt_path))
    elif not isinstance(strategy.checkpoint_io, CheckedCheckpointIO):
        strategy.checkpoint_io = CheckedCheckpointIO(strategy.checkpoint_io)


def unguard_loads(trainer: L.Trainer) -> None:
    """Undo `guard_loads`."""
    strategy = trainer.strategy
    if isinstance(strategy, CPUFSDPStrategy | FSDP2Strategy):
        strategy.load_with = None
    elif isinstance(strategy, FSDPStrategy | ModelParallelStrategy):
        return
    elif isinstance(strategy.checkpoint_io, CheckedCheckpointIO):
        strategy.checkpoint_io = strategy.checkpoint_io.wrapped


def make_unsafe_error(file: Path, reason: BaseException | str) -> UnsafeError:
    """The error for a file that would run code, or holds objects that torch can't load safely."""
    return UnsafeError(
        f"{file} holds objects that can't be loaded safely: a callback's `state_dict` must hold plain values and "
        f"tensors only. {reason if isinstance(reason, str) else first_line(reason)}"
    )
