"""Names, checksums and removal of the files in the round store."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from rlhf_pl.utils.disk import write_atomically
from rlhf_pl.utils.errors import InputError

SHARD = re.compile(r"(\d{5,})-[0-9a-f]{16}\.parquet")
NOTE = re.compile(r"_\d{5,}\.shard")
JOURNAL = re.compile(r"_\d{5,}\.journal")
ASIDE = "set_aside"  # in the run directory
_PARQUET = b"PAR1"
_SYSTEM_FILES = ("Thumbs.db", "desktop.ini")


class DamagedStoreError(InputError):
    """A file of the round store is missing or was changed."""


def checksum(content: Any) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of bytes."""
    return hashlib.sha256(content).hexdigest()[:16]


def content_checksum(content: Any) -> str:
    """The checksum of an object, encoded as JSON."""
    return checksum(json.dumps(content, sort_keys=True).encode())


def read_checked(file: Path) -> dict[str, Any] | None:
    """Read an object that `write_checked` wrote; None if the file is damaged or missing."""
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        expected = content.pop("checksum")  # type: ignore[union-attr]
    except PermissionError:
        raise
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return None
    return content if expected == content_checksum(content) else None


def write_checked(file: Path, content: dict[str, Any]) -> None:
    """Write a JSON object with its checksum atomically."""
    text = json.dumps({**content, "checksum": content_checksum(content)}, indent=2)
    write_atomically(file, lambda opened: opened.write(text.encode()))


def read_shard_file(file: Path) -> bytes | None:
    """Read a file if the checksum in its name matches; None for other files, folders, devices and broken links.

    Raises:
        OSError: The file can't be read.
    """
    content = file.read_bytes() if file.is_file() else None
    return content if content is not None and file.stem.split("-", 1)[1] == checksum(content) else None


def is_whole_shard(file: Path) -> bool:
    """Whether the checksum in a file's name matches its content; reads the whole file.

    Raises:
        OSError: The file can't be read.
    """
    return read_shard_file(file) is not None


def has_parquet_ends(file: Path) -> bool:
    """Whether a file has the first and last bytes of a Parquet file; reads nothing else.

    Raises:
        OSError: The file can't be read.
    """
    if not file.is_file() or file.stat().st_size < 2 * len(_PARQUET):
        return False
    with file.open("rb") as opened:
        start = opened.read(len(_PARQUET))
        opened.seek(-len(_PARQUET), os.SEEK_END)
        return start == opened.read(len(_PARQUET)) == _PARQUET


def is_ignored(name: str) -> bool:
    """Whether a file is hidden, an editor's backup or a file of a file manager; such files are never shards."""
    return name.startswith(".") or name.endswith("~") or name in _SYSTEM_FILES


def list_entries(folder: Path) -> list[Path]:
    """The entries of a folder, without ignored files; empty if the folder does not exist."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if not is_ignored(path.name))


def remove(path: Path) -> None:
    """Delete a file, a link or a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def set_aside(run_dir: Path, path: Path) -> Path:
    """Move a file or folder out of the store, to an unused name in `set_aside`; returns its new path."""
    preferred = run_dir / ASIDE / path.relative_to(run_dir)
    target, number = preferred, 1
    while os.path.lexists(target):
        number += 1
        target = preferred.with_name(f"{preferred.name}.{number}")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(path, target)
    return target
