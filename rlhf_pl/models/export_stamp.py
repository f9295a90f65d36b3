"""What an exported model's folder was written as, so that a file which is cut or changed later is noticed."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STAMP = "rlhf_pl.json"
NOT_EXPORTS = {"rounds", "heldout", "checkpoints"}  # in the run directory


def stamp_of(folder: Path) -> dict[str, Any] | None:
    """What the export that is there was made from, if there is one that says so."""
    try:
        content = json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def file_records(folder: Path) -> dict[str, dict[str, Any]]:
    """Size in bytes and SHA-256 of every file in a folder, by its path there."""
    return {
        file.relative_to(folder).as_posix(): {"size": file.stat().st_size, "sha256": _checksum(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def damaged_files(folder: Path, checksums: bool) -> list[Path]:
    """The files of an export that are not as they were written; those of earlier versions had no list of them.

    Args:
        folder: The exported model.
        checksums: Whether to read the files; otherwise their sizes are compared.
    """
    stamp = stamp_of(folder)
    if stamp is None:
        return [folder / STAMP]
    records = stamp.get("files", {})
    return [folder / name for name, record in sorted(records.items()) if not _is_as_written(folder / name, record,
                                                                                           checksums)]  # fmt: skip


def _is_as_written(file: Path, record: Any, checksums: bool) -> bool:
    try:
        if not file.is_file() or file.stat().st_size != record["size"]:
            return False
        return not checksums or _checksum(file) == record["sha256"]
    except (OSError, KeyError, TypeError):
        return False


def exports(run_dir: Path) -> Iterator[Path]:
    """The exported models in a run directory, adapters aside."""
    for folder, inside, files in os.walk(run_dir):
        if STAMP in files:
            inside.clear()
            yield Path(folder)
        inside[:] = sorted(name for name in inside if not name.startswith(".") and name not in NOT_EXPORTS)


def _checksum(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
