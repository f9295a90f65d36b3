"""One process per run directory: a lock that names its owner and dies with it."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from rlhf_pl.errors import InputError

NAME = ".lock"


class RunLock:
    """A POSIX lock on `<run_dir>/.lock`, which the system releases when the process dies, however it dies.

    The file tells who holds it. On file systems without locks that text decides: an owner on this host is alive if
    its process is, one on another host is believed.

    Args:
        run_dir: The run directory.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.folder = Path(run_dir)
        self._file: int | None = None
        self._made_folder = False

    def check(self) -> None:
        """Raise InputError if another process has the lock; takes nothing and writes nothing."""
        if self._file is None and (self.folder / NAME).exists():
            descriptor = os.open(self.folder / NAME, os.O_RDWR)
            try:
                self._refuse_owner(descriptor)
            finally:
                os.close(descriptor)  # which also releases

    def acquire(self) -> None:
        """Take the lock, making the folder if need be.

        Raises:
            InputError: Another process has it; names its host and process id.
        """
        if self._file is not None:
            return
        self._made_folder = not self.folder.exists()
        descriptor = self._open()
        while os.fstat(descriptor).st_ino != (self.folder / NAME).stat().st_ino:  # an owner has just left with its file
            os.close(descriptor)
            descriptor = self._open()
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(owner | {"ticks": _start_ticks(os.getpid())}).encode(), 0)
        self._file = descriptor

    def release(self) -> None:
        """Give the lock back; a folder that was made for it and holds nothing else goes with it."""
        if self._file is None:
            return
        (self.folder / NAME).unlink(missing_ok=True)
        os.close(self._file)
        self._file = None
        if self._made_folder:
            with contextlib.suppress(OSError):
                self.folder.rmdir()

    def _open(self) -> int:
        """The locked file."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder / NAME, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise InputError(
                f"`trainer.default_root_dir`: cannot write to {self.folder}: {error.strerror}. Give another directory."
            ) from error
        try:
            self._refuse_owner(descriptor)
        except InputError:
            os.close(descriptor)
            raise
        return descriptor

    def _refuse_owner(self, descriptor: int) -> None:
        """Lock the open file, or raise."""
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = _read(descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise InputError(self._message(owner, "End that process first")) from error
            if owner and not _is_dead(owner):
                hint = "End that process first, or if it is dead delete the file .lock there"
                raise InputError(self._message(owner, hint)) from error

    def _message(self, owner: dict[str, Any], end: str) -> str:
        return (
            f"{self.folder} is in use by process {owner.get('pid', 'unknown')} on host {owner.get('host', 'unknown')}, "
            f"since {owner.get('started', 'unknown')}. Two processes would overwrite each other. {end}, "
            "or give this run a directory of its own (--trainer.default_root_dir DIR)."
        )


def _read(descriptor: int) -> dict[str, Any]:
    try:
        content = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _is_dead(owner: dict[str, Any]) -> bool:
    """Whether an owner on this host has ended; its process id may be another's by now."""
    return owner.get("host") == socket.gethostname() and _start_ticks(owner.get("pid", 0)) != owner.get("ticks")


def _start_ticks(pid: int) -> str | None:
    """When a process started, in clock ticks since boot."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        return None
