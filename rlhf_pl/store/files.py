"""The files of the round store: their names, their checksums, and where those go that belong to no round."""

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
_OF_SYSTEMS = ("Thumbs.db", "desktop.ini")


class DamagedStoreError(InputError):
    """A file of the round store is not what was written."""


def checksum(content: Any) -> str:
    """16 hexadecimal digits of SHA-256."""
    return hashlib.sha256(content).hexdigest()[:16]


def content_checksum(content: Any) -> str:
    """The checksum of something as JSON."""
    return checksum(json.dumps(content, sort_keys=True).encode())


def read_checked(file: Path) -> dict[str, Any] | None:
    """What `write_checked` wrote; None if it is damaged or not there."""
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        noted = content.pop("checksum")  # type: ignore[union-attr]
    except PermissionError:
        raise
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return None
    return content if noted == content_checksum(content) else None


def write_checked(file: Path, content: dict[str, Any]) -> None:
    """A JSON object with its checksum, in one step."""
    text = json.dumps({**content, "checksum": content_checksum(content)}, indent=2)
    write_atomically(file, lambda opened: opened.write(text.encode()))


def read_shard_file(file: Path) -> bytes | None:
    """What is in a file that is what its name says; None of a damaged one, a folder, a device or a broken link.

    Raises:
        OSError: It can't be read.
    """
    content = file.read_bytes() if file.is_file() else None
    return content if content is not None and file.stem.split("-", 1)[1] == checksum(content) else None


def is_whole_shard(file: Path) -> bool:
    """Whether a file is what its name says; the whole of it is read.

    Raises:
        OSError: It can't be read.
    """
    return read_shard_file(file) is not None


def has_parquet_ends(file: Path) -> bool:
    """Whether a file begins and ends as Parquet files do; nothing else of it is read.

    Raises:
        OSError: It can't be read.
    """
    if not file.is_file() or file.stat().st_size < 2 * len(_PARQUET):
        return False
    with file.open("rb") as opened:
        begins = opened.read(len(_PARQUET))
        opened.seek(-len(_PARQUET), os.SEEK_END)
        return begins == opened.read(len(_PARQUET)) == _PARQUET


def is_of_others(name: str) -> bool:
    """Whether a file is hidden, an editor's backup or one that file managers leave: nothing takes such for a shard."""
    return name.startswith(".") or name.endswith("~") or name in _OF_SYSTEMS


def entries(folder: Path) -> list[Path]:
    """What is in a folder and not hidden or a backup; nothing where there is no folder."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if not is_of_others(path.name))


def remove(path: Path) -> None:
    """Delete a file, a link or a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def set_aside(run_dir: Path, path: Path) -> Path:
    """Move a file or folder out of the store, under a name that is free; returns where it is."""
    wanted = run_dir / ASIDE / path.relative_to(run_dir)
    target, number = wanted, 1
    while os.path.lexists(target):
        number += 1
        target = wanted.with_name(f"{wanted.name}.{number}")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(path, target)
    return target
