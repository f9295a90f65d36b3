"""Files that are either whole or not there, and clear words when the disk is full."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from rlhf_pl.utils.errors import InputError


class DiskFullError(InputError):
    """The disk has no room for what comes next; everything written before is whole."""


def free_bytes(path: Path) -> int:
    """Free space where `path` is or will be."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def size(count: float) -> str:
    """Bytes in words: `3.1 GiB`."""
    for unit in ("bytes", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def check_space(path: Path, parts: dict[str, int], before: str) -> None:
    """Refuse to start what would not fit.

    Args:
        path: The folder to be written to.
        parts: Bytes by what they are for.
        before: What comes next, for the message.

    Raises:
        DiskFullError: Less is free than `parts` sum up to.
    """
    needed, free = sum(parts.values()), free_bytes(path)
    if free < needed:
        listed = ", ".join(f"{name} {size(count)}" for name, count in parts.items() if count)
        raise DiskFullError(
            f"`trainer.default_root_dir`: {before} needs about {size(needed)} in {path} ({listed}), and {size(free)} "
            f"are free. Free {size(needed - free)} more and run the same command again; nothing is lost."
        )


def full_disk_error(path: Path, error: BaseException, needed: int | None = None) -> DiskFullError | None:
    """The error to raise instead of `error` if that says that the disk is full, else None."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if not full and needed is not None and isinstance(error, OSError | RuntimeError):
        full = free_bytes(path.parent) < needed  # torch reports a failed write without its cause
    if not full:
        return None
    free = free_bytes(path.parent)
    amount = f"it needs {size(needed)}, " if needed is not None else ""
    return DiskFullError(
        f"The disk is full: writing {path} failed ({amount}{size(free)} are free). What was written before is whole. "
        "Make room and run the same command again; it goes on from there."
    )


def write_atomically(target: Path, write: Callable[[IO[bytes]], object], needed: int | None = None) -> None:
    """Write beside `target`, flush to the disk, and rename: a file of that name is always whole.

    Args:
        target: The file; its folder is made.
        write: Writes the content to an open file.
        needed: Bytes, if known, for the message when the disk is full.

    Raises:
        DiskFullError: The disk is full; nothing is left behind.
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
        with suppress(OSError):  # of a file system that is read-only by now
            temporary.unlink()
        if full := full_disk_error(target, error, needed):
            raise full from error
        raise


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` outlast a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming_a_full_disk(path: Path) -> Iterator[None]:
    """Turn a full disk inside the block into the one clear error."""
    try:
        yield
    except OSError as error:
        if full := full_disk_error(path, error):
            raise full from error
        raise
