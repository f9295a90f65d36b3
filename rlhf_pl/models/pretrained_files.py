"""Reads names and shapes, or single tensors, from a model's weight files without loading the model."""

import hashlib
import json
import math
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_pl.models.config_files import WEIGHTS
from rlhf_pl.models.source import ModelSource
from rlhf_pl.utils.disk import format_bytes
from rlhf_pl.utils.errors import InputError, first_line

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # as safetensors calls them
_PIECES, _PIECE_BYTES = 64, 65536


def stored_config(source: ModelSource) -> dict[str, Any]:
    """The content of a model's config.json; empty if there is none."""
    file = _find_file(source, "config.json", quiet=True)
    try:
        content = json.loads(Path(file).read_text()) if file else {}
    except ValueError as error:
        raise InputError(f"`{source.option}`: the config.json of {source.path!r} is not JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _find_file(source: ModelSource, name: str, quiet: bool = False) -> str:
    """The local path of a model's file; empty if there is none."""
    from transformers.utils import cached_file

    found = cached_file(
        source.path,
        name,
        revision=source.revision,
        _raise_exceptions_for_missing_entries=not quiet,
        _raise_exceptions_for_gated_repo=not quiet,
        _raise_exceptions_for_connection_errors=not quiet,
    )
    return found or ""


class WeightFiles:
    """The weight files of a model folder or Hub id: safetensors, or `.bin` read with `weights_only`.

    Args:
        source: The model.

    Raises:
        InputError: There are none.
    """

    def __init__(self, source: ModelSource) -> None:
        self.source = source
        folder = source.check_path()
        name = next((n for n in WEIGHTS if self._file(n, quiet=True)), None)
        if name is None:
            found = sorted(f.name for f in folder.iterdir())[:12] if folder.is_dir() else []
            listed = f"; the folder holds {', '.join(found) or 'nothing'}" if folder.is_dir() else ""
            raise InputError(
                f"`{source.option}`: {source.path!r} has no weights ({WEIGHTS[0]} or {WEIGHTS[2]}){listed}."
            )
        self._index: list[str] = []
        if name.endswith(".json"):
            self._index = [name]
            index = self._read_index(Path(self._file(name)))
            self._file_of_tensor: dict[str, str] | None = index
            self._names = sorted(set(index.values()))
        else:
            self._file_of_tensor = None
            self._names = [name]

    def _file(self, name: str, quiet: bool = False) -> str:
        return _find_file(self.source, name, quiet)

    @property
    def names(self) -> list[str]:
        """Names of the index, if there is one, and of all weight files."""
        return [*self._index, *self._names]

    def _read_index(self, file: Path) -> dict[str, str]:
        """Read the index: the file of each tensor by the tensor's name."""
        try:
            index = json.loads(file.read_text())["weight_map"]
            if not index or not all(Path(name).name == name for name in index.values()):
                raise ValueError("`weight_map` must name files in this folder")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(
                f"`{self.source.option}`: {file} is not an index of weights: {type(error).__name__}: {error}. Download "
                "or copy it again."
            ) from error
        return index

    @property
    def files(self) -> list[Path]:
        """All weight files.

        Raises:
            InputError: A file that the index names is missing.
        """
        found = {name: self._file(name, quiet=True) for name in self._names}
        if missing := [name for name, file in found.items() if not file]:
            raise InputError(
                f"`{self.source.option}`: {self.source.path!r} lacks {', '.join(missing[:8])}, which its index names. "
                "Download or copy the missing files."
            )
        return [Path(file) for file in found.values()]

    @contextmanager
    def _opened(self, file: Path) -> Iterator[Any]:
        """Open a safetensors file, which checks by its header that it is complete."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as opened:
                yield opened
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"`{self.source.option}`: {file} is damaged or truncated ({format_bytes(file.stat().st_size)}): "
                f"{error}. Download or copy it again."
            ) from error

    def file_of(self, name: str) -> str:
        """The file that contains the tensor of that name; empty if none does."""
        files = self._file_of_tensor or dict.fromkeys(self.shapes, self._names[0])
        return files.get(name, "")

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by its name in the files."""
        found: dict[str, tuple[int, ...]] = {}
        for file in self.files:
            if file.suffix == ".safetensors":
                with self._opened(file) as opened:
                    found |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
            else:
                found |= {name: tuple(t.shape) for name, t in self._load_bin(file).items()}
        return found

    @cached_property
    def dtype(self) -> torch.dtype | None:
        """The most common dtype of the numbers, of float32, bfloat16 and float16; None if there are none of these."""
        numbers = dict.fromkeys(_DTYPES, 0)
        for file in self.files:
            if file.suffix == ".safetensors":
                with self._opened(file) as opened:
                    for name in opened.keys():  # noqa: SIM118
                        stored = opened.get_slice(name)
                        if (kind := stored.get_dtype()) in numbers:
                            numbers[kind] += math.prod(stored.get_shape())
            else:
                kinds = {dtype: kind for kind, dtype in _DTYPES.items()}
                for tensor in self._load_bin(file).values():
                    if tensor.dtype in kinds:
                        numbers[kinds[tensor.dtype]] += tensor.numel()
        most = max(numbers, key=lambda kind: numbers[kind])
        return _DTYPES[most] if numbers[most] else None

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors of these names."""
        requested = set(names)
        found: dict[str, Tensor] = {}
        for name, file in zip(self._names, self.files, strict=True):
            here = (
                requested if self._file_of_tensor is None else {n for n in requested if self._file_of_tensor[n] == name}
            )
            if not here:
                continue
            if file.suffix == ".safetensors":
                with self._opened(file) as opened:
                    found |= {n: opened.get_tensor(n) for n in here}
            else:
                state = self._load_bin(file)
                found |= {n: state[n] for n in here}
        return found

    def _load_bin(self, file: Path) -> dict[str, Tensor]:
        try:
            mmap = zipfile.is_zipfile(file)  # files of torch before 1.6 are not zip files
            state: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
        except Exception as error:  # pickle and zip errors of many kinds
            message = f"`{self.source.option}`: cannot read {file} as weights only: {first_line(error)}."
            raise InputError(message) from error
        if not isinstance(state, dict):
            raise InputError(
                f"`{self.source.option}`: {file} holds a {type(state).__name__}; it must be tensors by name"
            )
        return {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)}

    def fingerprint(self) -> str:
        """A short hash of the files: of their sizes, and of pieces at regular distances."""
        digest = hashlib.sha256()
        for file in self.files:
            size = file.stat().st_size
            digest.update(f"{file.name}:{size}".encode())
            with file.open("rb") as opened:
                for piece in range(_PIECES):
                    opened.seek(max(0, size - _PIECE_BYTES) * piece // (_PIECES - 1))
                    digest.update(opened.read(_PIECE_BYTES))
        return digest.hexdigest()[:16]
