"""One process per run directory: a lock that names its owner and dies with it."""

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
PATIENCE = 10.0  # seconds that a killed owner may take to leave: freeing a large process's memory takes some
SETTLING = 0.5  # seconds after which two that start at once, in a file system without locks, see each other
_ATTEMPTS = 100  # while other owners leave with their file
_TAKEN = (errno.EWOULDBLOCK, errno.EACCES)  # other errors: no locks in this file system
_EXITING = 4  # PF_EXITING in /proc/PID/stat
_held: WeakSet["RunLock"] = WeakSet()


class RunLock:
    """The lock on a run directory, which the system releases when the process dies, however it dies.

    It is a `flock` on `<run_dir>/.lock`, and one on the directory, which counts where that file was deleted. Other code
    of the process may open and close both; forked children close them, so that none keeps the lock after its parent.

    The file tells who holds it. On file systems without locks that text decides: an owner on this host is alive if
    its process is; one on another host, or in a container with processes of its own, is believed.

    Args:
        run_dir: The run directory.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.folder = Path(run_dir)
        self._open: list[int] = []  # the file and the directory
        self._made_folder = False

    def check(self) -> None:
        """Raise InputError if another process has the lock; takes nothing and writes nothing."""
        if self._open:
            return
        with self._naming_place(), contextlib.suppress(FileNotFoundError):
            places = [place for place in (self.folder / NAME, self.folder) if place.exists()]
            with _opened(places, os.O_RDONLY | os.O_NONBLOCK) as descriptors:
                self._refuse_owner(descriptors, fcntl.LOCK_SH)

    def acquire(self) -> None:
        """Take the lock, making the folder if need be.

        Raises:
            InputError: Another process has it; names its host and process id.
        """
        if self._open:
            return
        self._made_folder = not self.folder.exists()
        with self._naming_place():
            for _ in range(_ATTEMPTS):
                with contextlib.suppress(FileNotFoundError):  # an owner has just left with a folder that it had made
                    if self._take():
                        return
            self._take()

    def _take(self) -> bool:
        """Lock file and directory, and write who we are; False if an owner has just left with its file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        os.close(os.open(self.folder / NAME, os.O_RDWR | os.O_CREAT, 0o644))
        with _opened([self.folder / NAME, self.folder], os.O_RDWR) as descriptors:
            try:
                is_locked = self._refuse_owner(descriptors, fcntl.LOCK_EX)
            except InputError:
                self._remove_nobodys(descriptors[0])
                raise
            if not _is_at(descriptors[0], self.folder / NAME):
                return False
            text = json.dumps(_myself(descriptors[0])).encode()
            os.ftruncate(descriptors[0], 0)
            os.pwrite(descriptors[0], text, 0)
            if not is_locked:
                time.sleep(SETTLING)
                if (now := (self.folder / NAME).read_bytes()) != text:
                    raise self._error(_parsed(now), "End that process first")
            _held.add(self)
            self._open = descriptors.copy()
            descriptors.clear()
        return True

    def _remove_nobodys(self, descriptor: int) -> None:
        """Remove a file that names nobody: one who is refused has made it, as the owner had just left with its own."""
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_size == 0 and _is_at(descriptor, self.folder / NAME):
                (self.folder / NAME).unlink()

    def release(self) -> None:
        """Give the lock back; a folder that was made for it and holds nothing else goes with it."""
        if not self._open:
            return
        if _is_at(self._open[0], self.folder / NAME):
            (self.folder / NAME).unlink(missing_ok=True)
        self.forget()
        if self._made_folder:
            with contextlib.suppress(OSError):
                self.folder.rmdir()

    def forget(self) -> None:
        """Close what is locked. Closed by a forked child, it stays locked for its parent."""
        for descriptor in self._open:
            os.close(descriptor)
        self._open = []
        _held.discard(self)

    def _refuse_owner(self, descriptors: list[int], how: int) -> bool:
        """Lock open files; whether the file system has locks.

        Raises:
            InputError: Another process has one of them, or owns the directory by what the file says.
        """
        end = time.monotonic() + PATIENCE
        while (is_free := _lock(descriptors, how)) is False:
            owner = _owner(descriptors)
            if _is_alive(owner) is not False:
                raise self._error(owner, "End that process first")
            if time.monotonic() > end:
                raise self._error(owner, "That process is dead; end those that it started, which keep the directory")
            time.sleep(0.1)
        owner = _owner(descriptors)
        if is_free is None and owner and _is_alive(owner) is not False:
            raise self._error(owner, "End that process first, or if it is dead delete the file .lock there")
        # lost by a living owner, to code that closes all files or a server that went down; a copy is another file
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
    def _naming_place(self) -> Any:
        try:
            yield
        except OSError as error:
            lock = self.folder / NAME
            if os.path.lexists(lock) and not stat.S_ISREG(lock.lstat().st_mode):
                raise InputError(f"{lock} is no file, and the lock must be one: move it away.") from error
            raise InputError(
                f"`trainer.default_root_dir`: cannot write to {self.folder}: {error.strerror}. Give another directory."
            ) from error


def _forget_all() -> None:
    for lock in list(_held):
        lock.forget()


os.register_at_fork(after_in_child=_forget_all)


@contextlib.contextmanager
def _opened(places: list[Path], flags: int) -> Any:
    """Descriptors of files and folders, the file's first; what is left in the list is closed at the end."""
    descriptors: list[int] = []
    try:
        for place in places:
            descriptors.append(os.open(place, os.O_RDONLY if place.is_dir() else flags))
        yield descriptors
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _lock(descriptors: list[int], how: int) -> bool | None:
    """Whether all could be locked; None where the first can't be, because the file system has no locks."""
    if not descriptors:
        return True
    if _try(fcntl.lockf, descriptors[0], how) is False:  # an earlier version's POSIX lock, which a flock passes by
        return False
    with contextlib.suppress(OSError):
        fcntl.lockf(descriptors[0], fcntl.LOCK_UN)
    found = [_try(fcntl.flock, descriptor, how) for descriptor in descriptors]
    return False if False in found else found[0]


def _try(lock: Any, descriptor: int, how: int) -> bool | None:
    try:
        lock(descriptor, how | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in _TAKEN else None
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _identity(descriptor: int) -> list[int]:
    found = os.fstat(descriptor)
    return [found.st_dev, found.st_ino]


def _myself(descriptor: int) -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "ticks": _start_ticks(os.getpid()),
        "namespace": _namespace(),
        "file": _identity(descriptor),
    }


def _owner(descriptors: list[int]) -> dict[str, Any]:
    """What the file says; nothing if it is not there."""
    try:
        return _parsed(os.pread(descriptors[0], 4096, 0))
    except (OSError, IndexError):
        return {}


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_alive(owner: dict[str, Any]) -> bool | None:
    """Whether an owner lives, whose process id may be another's by now; None where that can't be seen from here."""
    here = _namespace()
    if owner.get("host") != socket.gethostname() or owner.get("namespace", here) != here:
        return None
    ticks = _start_ticks(owner.get("pid", 0))
    return ticks is not None and ticks == owner.get("ticks")


def _start_ticks(pid: int) -> str | None:
    """When a process started, in clock ticks since boot; None for one that has ended, also if nobody has noticed."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return None if fields[0] in "ZXx" or int(fields[6]) & _EXITING else fields[19]
    except (OSError, IndexError, ValueError):
        return None


def _namespace() -> str | None:
    """In which process ids hold; two containers may have the same host name."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None
