"""Atomic writes of files, and clear errors when the disk is full."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from rlhf_pl.utils.errors import InputError


class DiskFullError(InputError):
    """The disk has no space for the next write. Earlier files are intact."""


def free_bytes(path: Path) -> int:
    """Free bytes of the file system that `path` is or will be on."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def format_bytes(count: float) -> str:
    """A number of bytes with its unit, such as `3.1 GiB`."""
    for unit in ("bytes", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def check_space(path: Path, parts: dict[str, int], before: str) -> None:
    """Refuse a step whose files would not fit on the disk.

    Args:
        path: The folder to write to.
        parts: Bytes by purpose.
        before: The next step, for the message.

    Raises:
        DiskFullError: The free space is less than the sum of `parts`.
    """
    needed, free = sum(parts.values()), free_bytes(path)
    if free < needed:
        listed = ", ".join(f"{name} {format_bytes(count)}" for name, count in parts.items() if count)
        raise DiskFullError(
            f"`trainer.default_root_dir`: {before} needs about {format_bytes(needed)} in {path} ({listed}), and "
            f"{format_bytes(free)} are free. Free {format_bytes(needed - free)} more and run the same command again. "
            "Nothing is lost."
        )


def full_disk_error(path: Path, error: BaseException, needed: int | None = None) -> DiskFullError | None:
    """The error to raise instead of `error` if the cause is a full disk, else None."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if not full and needed is not None and isinstance(error, OSError | RuntimeError):
        full = free_bytes(path.parent) < needed  # torch does not report the cause of a failed write
    if not full:
        return None
    free = free_bytes(path.parent)
    amount = f"it needs {format_bytes(needed)}, " if needed is not None else ""
    return DiskFullError(
        f"The disk is full: writing {path} failed ({amount}{format_bytes(free)} are free). Earlier files are intact. "
        "Free some space and run the same command again to resume."
    )


def write_atomically(target: Path, write: Callable[[IO[bytes]], object], needed: int | None = None) -> None:
    """Write a temporary file beside `target`, flush it to the disk, and rename it, so that `target` is always whole.

    Args:
        target: The file. Its folder is created.
        write: Writes the content to an open file.
        needed: Size in bytes if known, for the message when the disk is full.

    Raises:
        DiskFullError: The disk is full. The temporary file is removed.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        sync_folder(target.parent)
    except BaseException as error:
        with suppress(OSError):  # the file system may have become read-only
            temporary.unlink()
        if full := full_disk_error(target, error, needed):
            raise full from error
        raise


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def translate_full_disk(path: Path) -> Iterator[None]:
    """Raise DiskFullError for errors in the block that are caused by a full disk."""
    try:
        yield
    except OSError as error:
        if full := full_disk_error(path, error):
            raise full from error
        raise
