"""Checkpoints are looked at before torch or Lightning loads them, so that no pickle in one can run code.

torch unpickles a sharded checkpoint's `.metadata` and its byte entries without restriction, and Lightning's FSDP
strategy does so with a whole file.
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
from torch.distributed.checkpoint import CheckpointException, metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo

from rlhf_pl.distributed.strategies import CPUFSDPStrategy, FSDP2Strategy
from rlhf_pl.utils.errors import InputError

METADATA = ".metadata"
META = "meta.pt"  # in a sharded checkpoint, all but weights and optimizer
_CLASSES = (
    *(getattr(metadata, name) for name in metadata.__all__),
    metadata._MEM_FORMAT_ENCODING,
    _StorageInfo,
    torch.Size,
    OrderedDict,
    *(PosixPath, WindowsPath, PurePosixPath, PureWindowsPath),
)
_ALLOWED: dict[tuple[str, str], Any] = {(kind.__module__, kind.__qualname__): kind for kind in _CLASSES}
_ALLOWED |= {("pathlib", kind.__name__): kind for kind in _CLASSES[-4:]}  # as Python before 3.13 calls them
_ALLOWED |= {("torch.serialization", "_get_layout"): torch.serialization._get_layout}
_ALLOWED |= {("torch", str(value).removeprefix("torch.")): value for value in vars(torch).values()
             if isinstance(value, torch.dtype)}  # fmt: skip


class UnsafeError(InputError):
    """A checkpoint asks for more than plain values and tensors."""


class DamagedError(InputError):
    """A part of a checkpoint can't be read."""


class _Unpickler(pickle.Unpickler):
    """Makes what torch writes into `.metadata`, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise UnsafeError(f"{module}.{name}")
        return _ALLOWED[module, name]


def read_metadata(folder: Path) -> metadata.Metadata:
    """What a sharded checkpoint holds, by its `.metadata`.

    Raises:
        UnsafeError: The file would run code.
        DamagedError: It is missing, or not what torch writes.
    """
    found = [_unpickled(file) for file in (folder / METADATA, *sorted(folder.glob(f"__*{METADATA}")))]
    return found[0]  # the others, of each rank, are what torch takes where ranks do not talk to each other


def _unpickled(file: Path) -> metadata.Metadata:
    try:
        content = _Unpickler(io.BytesIO(file.read_bytes())).load()
    except UnsafeError as error:
        raise unsafe(file, f"{error} is none of torch's classes for it") from error
    except Exception as error:  # unpickling garbage raises everything
        raise DamagedError(f"{file} can't be read: {_line(error)}. Go on from another checkpoint.") from error
    if not isinstance(content, metadata.Metadata) or not isinstance(content.storage_data, dict):
        raise DamagedError(f"{file} is not what torch writes beside a sharded checkpoint. Go on from another one.")
    return content


def check_folder(folder: Path) -> metadata.Metadata:
    """Refuse a sharded checkpoint with anything that loading it would run; returns its metadata.

    Raises:
        UnsafeError: Names the file that would run code.
        DamagedError: Names the file that can't be read.
    """
    found = read_metadata(folder)
    for index, place in found.storage_data.items():
        name = str(place.relative_path)
        if Path(name).name != name or place.transform_descriptors:
            raise unsafe(folder / METADATA, f"{index.fqn} is said to lie in {name!r}, or to be transformed")
        if not isinstance(found.state_dict_metadata.get(index.fqn), metadata.TensorStorageMetadata):
            _check_bytes(folder / name, place)  # tensors torch reads with `weights_only`
    return found


def _check_bytes(file: Path, place: Any) -> None:
    """Read an entry of a part as plain values, which torch would unpickle without restriction."""
    try:
        with file.open("rb") as opened:
            opened.seek(place.offset)
            torch.load(io.BytesIO(opened.read(place.length)), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise unsafe(file, error) from error
    except Exception as error:  # and zip errors of many kinds
        raise DamagedError(f"{file} can't be read: {_line(error)}. Go on from another checkpoint.") from error


def check_checkpoint(path: Path) -> None:
    """Refuse a checkpoint of either form that holds more than plain values and tensors.

    Raises:
        InputError: Names the file, and what it holds.
    """
    if path.is_dir():
        check_folder(path)
        path = path / META
    try:
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise unsafe(path, error) from error
    except Exception as error:  # zip errors of many kinds
        raise DamagedError(f"{path} is no readable checkpoint: {_line(error)}.") from error


def load_checked(load: Callable[..., Any], path: Any, **options: Any) -> Any:
    """Load a checkpoint by a function of Lightning's, after a look at it.

    Args:
        load: Takes the path, `options` and `weights_only`.
        path: A file or a folder; what is not there is left to `load`.
        **options: Of `load`.

    Raises:
        InputError: It holds more than plain values and tensors, or can't be read.
    """
    if Path(path).exists():
        check_checkpoint(Path(path))
    try:
        return load(path, **options, weights_only=True)
    except (CheckpointException, pickle.UnpicklingError) as error:
        raise DamagedError(f"{path} can't be read: {_line(error)}. Go on from another one.") from error


class CheckedCheckpointIO(CheckpointIO):
    """A Trainer's own `CheckpointIO` that looks at every checkpoint before it loads it.

    Args:
        plain: Reads and writes them.
    """

    def __init__(self, plain: CheckpointIO) -> None:
        self.plain = plain

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        self.plain.save_checkpoint(checkpoint, path, storage_options)

    def load_checkpoint(self, path: Any, map_location: Any | None = None, weights_only: bool | None = None) -> Any:
        options = {} if map_location is None else {"map_location": map_location}
        return load_checked(self.plain.load_checkpoint, path, **options)

    def remove_checkpoint(self, path: Any) -> None:
        self.plain.remove_checkpoint(path)

    def teardown(self) -> None:
        self.plain.teardown()


def guard_loads(trainer: L.Trainer) -> None:
    """Have a Trainer look at every checkpoint that it is about to load, whoever asks for it, until `release_loads`.

    Lightning's own FSDPStrategy and ModelParallelStrategy load without a CheckpointIO; ours can be told.
    """
    strategy = trainer.strategy
    if isinstance(strategy, CPUFSDPStrategy | FSDP2Strategy):
        strategy.load_by = load_checked
    elif not isinstance(strategy.checkpoint_io, CheckedCheckpointIO):
        strategy.checkpoint_io = CheckedCheckpointIO(strategy.checkpoint_io)


def release_loads(trainer: L.Trainer) -> None:
    """Have a Trainer load checkpoints as it did before `guard_loads`."""
    strategy = trainer.strategy
    if isinstance(strategy, CPUFSDPStrategy | FSDP2Strategy):
        strategy.load_by = None
    elif isinstance(strategy.checkpoint_io, CheckedCheckpointIO):
        strategy.checkpoint_io = strategy.checkpoint_io.plain


def unsafe(file: Path, reason: BaseException | str) -> UnsafeError:
    """The error for a file that would run code, or that holds objects which torch does not load safely."""
    return UnsafeError(
        f"{file} holds objects that can't be loaded safely: a callback's `state_dict` must hold plain values and "
        f"tensors only. {reason if isinstance(reason, str) else _line(reason)}"
    )


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
