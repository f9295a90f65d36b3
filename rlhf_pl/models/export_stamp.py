"""The record of an exported model's files, to detect files that are truncated or changed later."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STAMP = "rlhf_pl.json"
NOT_EXPORTS = {"rounds", "heldout", "checkpoints"}  # in the run directory


def read_stamp(folder: Path) -> dict[str, Any] | None:
    """The record of an export; None if the folder has none, or it is not valid."""
    try:
        content = json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def file_records(folder: Path) -> dict[str, dict[str, Any]]:
    """Size in bytes and SHA-256 of every file in a folder, by its relative path."""
    return {
        file.relative_to(folder).as_posix(): {"size": file.stat().st_size, "sha256": _checksum(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def find_damaged_files(folder: Path, checksums: bool) -> list[Path]:
    """The files of an export that have changed since it was written. Earlier versions recorded no files.

    Args:
        folder: The exported model.
        checksums: Whether to read the files and compare their hashes; otherwise only sizes are compared.
    """
    stamp = read_stamp(folder)
    if stamp is None:
        return [folder / STAMP]
    records = stamp.get("files", {})
    return [folder / name for name, record in sorted(records.items()) if not _is_unchanged(folder / name, record,
                                                                                           checksums)]  # fmt: skip


def _is_unchanged(file: Path, record: Any, checksums: bool) -> bool:
    try:
        if not file.is_file() or file.stat().st_size != record["size"]:
            return False
        return not checksums or _checksum(file) == record["sha256"]
    except (OSError, KeyError, TypeError):
        return False


def find_exports(run_dir: Path) -> Iterator[Path]:
    """The exported models in a run directory, without adapters."""
    for folder, subfolders, files in os.walk(run_dir):
        if STAMP in files:
            subfolders.clear()
            yield Path(folder)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(".") and name not in NOT_EXPORTS)


def _checksum(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
