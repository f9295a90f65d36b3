"""A lock that allows one process per run directory. It names its owner and ends with the owner's process."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import stat
import time
from pathlib import Path
from typing import Any
from weakref import WeakSet

from rlhf_pl.utils.errors import InputError

NAME = ".lock"
EXIT_TIMEOUT_S = 10.0  # to wait for a killed owner: freeing a large process's memory takes time
SETTLE_S = 0.5  # after which two simultaneous starts on a file system without locks see each other
_ATTEMPTS = 100  # while previous owners remove their files
_TAKEN = (errno.EWOULDBLOCK, errno.EACCES)  # other errors: the file system has no locks
_EXITING = 4  # PF_EXITING in /proc/PID/stat
_held: WeakSet["RunLock"] = WeakSet()


class RunLock:
    """The lock on a run directory. The system releases it when the process ends in any way.

    It is a `flock` on `<run_dir>/.lock` and one on the directory, which still holds if the file is deleted. Other code
    of the process may open and close both. Forked children close them, so that no child holds the lock after its
    parent has ended.

    The file names the owner. On file systems without locks its text decides: an owner on this host holds the lock while
    its process is alive; an owner on another host, or in a container with its own process ids, is assumed alive.

    Args:
        run_dir: The run directory.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.folder = Path(run_dir)
        self._open: list[int] = []  # the file and the directory
        self._has_made_folder = False

    def check(self) -> None:
        """Raise InputError if another process holds the lock. Does not acquire it and writes nothing."""
        if self._open:
            return
        with self._translate_os_errors(), contextlib.suppress(FileNotFoundError):
            paths = [path for path in (self.folder / NAME, self.folder) if path.exists()]
            with _open_all(paths, os.O_RDONLY | os.O_NONBLOCK) as descriptors:
                self._refuse_owner(descriptors, fcntl.LOCK_SH)

    def acquire(self) -> None:
        """Acquire the lock. Creates the folder if needed.

        Raises:
            InputError: Another process holds it. The message has its host and process id.
        """
        if self._open:
            return
        self._has_made_folder = not self.folder.exists()
        with self._translate_os_errors():
            for _ in range(_ATTEMPTS):
                with contextlib.suppress(FileNotFoundError):  # an owner has just removed the folder
                    if self._try_acquire():
                        return
            self._try_acquire()

    def _try_acquire(self) -> bool:
        """Lock file and directory, and write the owner; False if a previous owner has just removed its file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        os.close(os.open(self.folder / NAME, os.O_RDWR | os.O_CREAT, 0o644))
        with _open_all([self.folder / NAME, self.folder], os.O_RDWR) as descriptors:
            try:
                has_locks = self._refuse_owner(descriptors, fcntl.LOCK_EX)
            except InputError:
                self._remove_empty(descriptors[0])
                raise
            if not _is_at(descriptors[0], self.folder / NAME):
                return False
            text = json.dumps(_describe_self(descriptors[0])).encode()
            os.ftruncate(descriptors[0], 0)
            os.pwrite(descriptors[0], text, 0)
            if not has_locks:
                time.sleep(SETTLE_S)
                if (now := (self.folder / NAME).read_bytes()) != text:
                    raise self._error(_parse_owner(now), "End that process first")
            _held.add(self)
            self._open = descriptors.copy()
            descriptors.clear()
        return True

    def _remove_empty(self, descriptor: int) -> None:
        """Remove a lock file without an owner: this process created it after the owner had removed its own."""
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_size == 0 and _is_at(descriptor, self.folder / NAME):
                (self.folder / NAME).unlink()

    def release(self) -> None:
        """Release the lock. Removes the folder if `acquire` created it and it is empty."""
        if not self._open:
            return
        if _is_at(self._open[0], self.folder / NAME):
            (self.folder / NAME).unlink(missing_ok=True)
        self.close()
        if self._has_made_folder:
            with contextlib.suppress(OSError):
                self.folder.rmdir()

    def close(self) -> None:
        """Close the locked files. If a forked child does, its parent still holds the lock."""
        for descriptor in self._open:
            os.close(descriptor)
        self._open = []
        _held.discard(self)

    def _refuse_owner(self, descriptors: list[int], how: int) -> bool:
        """Lock open files. Returns whether the file system has locks.

        Args:
            descriptors: Of the lock file and the directory.
            how: The kind of lock, `LOCK_SH` or `LOCK_EX`.

        Raises:
            InputError: Another process has locked one of them, or is the owner named in the file.
        """
        end = time.monotonic() + EXIT_TIMEOUT_S
        while (is_free := _lock(descriptors, how)) is False:
            owner = _read_owner(descriptors)
            if _is_alive(owner) is not False:
                raise self._error(owner, "End that process first")
            if time.monotonic() > end:
                raise self._error(owner, "That process is dead; end its child processes, which still hold the lock")
            time.sleep(0.1)
        owner = _read_owner(descriptors)
        if is_free is None and owner and _is_alive(owner) is not False:
            raise self._error(owner, "End that process first, or if it is dead delete the file .lock there")
        # a living owner has lost its lock: code closed all files, or a file server failed; in a copy `file` differs
        if is_free and _is_alive(owner) and owner.get("file") == _identity(descriptors[0]):
            raise self._error(owner, "End that process first")
        return bool(is_free)

    def _error(self, owner: dict[str, Any], end: str) -> InputError:
        return InputError(
            f"{self.folder} is in use by process {owner.get('pid', 'unknown')} on host {owner.get('host', 'unknown')}, "
            f"since {owner.get('started', 'unknown')}. Two processes would overwrite each other. {end}, "
            "or give this run a directory of its own (--trainer.default_root_dir DIR)."
        )

    @contextlib.contextmanager
    def _translate_os_errors(self) -> Any:
        try:
            yield
        except OSError as error:
            lock = self.folder / NAME
            if os.path.lexists(lock) and not stat.S_ISREG(lock.lstat().st_mode):
                raise InputError(f"{lock} is not a regular file, as the lock must be: move it away.") from error
            raise InputError(
                f"`trainer.default_root_dir`: cannot write to {self.folder}: {error.strerror}. Give another directory."
            ) from error


def _close_all() -> None:
    for lock in list(_held):
        lock.close()


os.register_at_fork(after_in_child=_close_all)


@contextlib.contextmanager
def _open_all(paths: list[Path], flags: int) -> Any:
    """Open files and folders. Descriptors that are still in the list at the end of the block are closed."""
    descriptors: list[int] = []
    try:
        for path in paths:
            descriptors.append(os.open(path, os.O_RDONLY if path.is_dir() else flags))
        yield descriptors
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _lock(descriptors: list[int], how: int) -> bool | None:
    """Whether all files are now locked; None if the file system has no locks."""
    if not descriptors:
        return True
    if _try_lock(fcntl.lockf, descriptors[0], how) is False:  # an earlier version's POSIX lock, which flock ignores
        return False
    with contextlib.suppress(OSError):
        fcntl.lockf(descriptors[0], fcntl.LOCK_UN)
    found = [_try_lock(fcntl.flock, descriptor, how) for descriptor in descriptors]
    return False if False in found else found[0]


def _try_lock(lock: Any, descriptor: int, how: int) -> bool | None:
    try:
        lock(descriptor, how | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in _TAKEN else None
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one at `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _identity(descriptor: int) -> list[int]:
    found = os.fstat(descriptor)
    return [found.st_dev, found.st_ino]


def _describe_self(descriptor: int) -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "ticks": _start_ticks(os.getpid()),
        "namespace": _namespace(),
        "file": _identity(descriptor),
    }


def _read_owner(descriptors: list[int]) -> dict[str, Any]:
    """The owner that the lock file names; empty if there is none."""
    try:
        return _parse_owner(os.pread(descriptors[0], 4096, 0))
    except (OSError, IndexError):
        return {}


def _parse_owner(text: bytes) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_alive(owner: dict[str, Any]) -> bool | None:
    """Whether an owner is alive, and its process id not reused; None if that can't be determined on this host."""
    here = _namespace()
    if owner.get("host") != socket.gethostname() or owner.get("namespace", here) != here:
        return None
    ticks = _start_ticks(owner.get("pid", 0))
    return ticks is not None and ticks == owner.get("ticks")


def _start_ticks(pid: int) -> str | None:
    """Start time of a process, in clock ticks since boot; None if it has ended, zombies included."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return None if fields[0] in "ZXx" or int(fields[6]) & _EXITING else fields[19]
    except (OSError, IndexError, ValueError):
        return None


def _namespace() -> str | None:
    """Namespace of this process's id; two containers may have the same host name."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None
