import contextlib
import errno
import fcntl
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rlhf_pl.utils import lock as lock_module
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.lock import RunLock

HOLD = """
import multiprocessing, os, subprocess, sys, threading, time
from rlhf_pl.utils.lock import RunLock
lock = RunLock(sys.argv[1])
lock.acquire()
CHILDREN
print("locked", flush=True)
time.sleep(60)
"""
# like a loader's workers; from another thread; with `subprocess` and open descriptors; a child of a child
CHILDREN = {
    "fork": "multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,)).start()",
    "in a thread": """
started = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,))
threading.Thread(target=started.start).start()
while started.pid is None:
    time.sleep(0.01)
""",
    "exec": "subprocess.Popen(['sleep', '60'], close_fds=False)",
    "fork of a fork": """
if os.fork() == 0:
    if os.fork() == 0:
        time.sleep(60)
    time.sleep(60)
""",
    "spawn": "multiprocessing.get_context('spawn').Process(target=time.sleep, args=(60,)).start()",
}

Holder = Callable[..., subprocess.Popen]


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Holder]:
    """A function that starts a process which holds the lock on `run` and has children."""
    started = []

    def start(children: str = "", source: str = HOLD) -> subprocess.Popen:
        command = [sys.executable, "-c", source.replace("CHILDREN", children), str(tmp_path / "run")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def holder(hold: Holder) -> subprocess.Popen:
    return hold()


def kill(process: subprocess.Popen) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def read_owner(folder: Path) -> dict:
    return json.loads((folder / ".lock").read_text())


def disable_locks(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def unsupported(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", unsupported)
    monkeypatch.setattr("fcntl.lockf", unsupported)
    monkeypatch.setattr(lock_module, "SETTLE_S", 0.01)


def test_the_error_for_a_second_process_names_the_owner(tmp_path: Path, holder: subprocess.Popen) -> None:
    lock = RunLock(tmp_path / "run")
    for attempt in (lock.check, lock.acquire):
        with pytest.raises(InputError) as error:
            attempt()
        assert f"process {holder.pid} on host {socket.gethostname()}" in str(error.value)


def test_a_dead_owners_lock_can_be_acquired(tmp_path: Path, holder: subprocess.Popen) -> None:
    kill(holder)
    assert (tmp_path / "run" / ".lock").exists()
    lock = RunLock(tmp_path / "run")
    lock.check()
    lock.acquire()
    assert read_owner(tmp_path / "run")["pid"] == os.getpid()
    lock.release()
    assert not (tmp_path / "run" / ".lock").exists()


def test_the_owner_may_read_copy_and_lock_its_files(tmp_path: Path, hold: Holder) -> None:
    """A process loses its POSIX locks on a file when it closes any descriptor of the file."""
    hold("""
import fcntl, shutil
open(sys.argv[1] + "/.lock").read()
shutil.copytree(sys.argv[1], sys.argv[1] + "-copy")
with open(sys.argv[1] + "/.lock", "r+") as file:
    fcntl.lockf(file, fcntl.LOCK_EX)
lock.check()
""")
    with pytest.raises(InputError, match="in use by process"):
        RunLock(tmp_path / "run").acquire()
    RunLock(tmp_path / "run-copy").acquire()  # names a living owner, but of another file


@pytest.mark.parametrize("kind", CHILDREN)
def test_no_child_holds_a_dead_owners_lock(tmp_path: Path, hold: Holder, kind: str) -> None:
    owner = hold(CHILDREN[kind])
    with pytest.raises(InputError, match="in use by process"):  # nor does a child release it
        RunLock(tmp_path / "run").acquire()
    kill(owner)
    began = time.monotonic()
    RunLock(tmp_path / "run").acquire()
    assert time.monotonic() - began < 2
    os.killpg(owner.pid, 0)  # raises if the children are dead too


def test_a_child_does_not_release_its_parents_lock(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.acquire()
    child = multiprocessing.get_context("fork").Process(target=lock.release)
    child.start()
    child.join()
    assert (tmp_path / ".lock").exists()
    with pytest.raises(InputError, match=f"process {os.getpid()} on host"):
        RunLock(tmp_path).acquire()


def test_an_owner_that_is_slow_to_exit_is_waited_for(tmp_path: Path, holder: subprocess.Popen) -> None:
    """The owner is dead, but another process holds a descriptor for one more second."""
    file = os.open(tmp_path / "run" / ".lock", os.O_RDWR)
    kill(holder)
    fcntl.flock(file, fcntl.LOCK_EX)
    threading.Timer(1.0, os.close, [file]).start()
    RunLock(tmp_path / "run").acquire()


def test_a_descriptor_that_outlives_its_owner_is_an_error(
    tmp_path: Path, holder: subprocess.Popen, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = os.open(tmp_path / "run" / ".lock", os.O_RDWR)
    kill(holder)
    fcntl.flock(file, fcntl.LOCK_EX)
    monkeypatch.setattr(lock_module, "EXIT_TIMEOUT_S", 0.2)
    with pytest.raises(InputError, match="That process is dead; end its child processes"):
        RunLock(tmp_path / "run").acquire()
    os.close(file)


@pytest.mark.parametrize("replaced", [False, True])
def test_deleting_the_file_does_not_release_the_lock(tmp_path: Path, holder: subprocess.Popen, replaced: bool) -> None:
    (tmp_path / "run" / ".lock").unlink()
    if replaced:
        (tmp_path / "run" / ".lock").write_text("")
    lock = RunLock(tmp_path / "run")
    for attempt in (lock.check, lock.acquire):
        with pytest.raises(InputError, match="in use by process unknown"):
            attempt()


def test_an_owner_does_not_remove_another_owners_file(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.acquire()
    (tmp_path / ".lock").unlink()
    (tmp_path / ".lock").write_text("another's")
    lock.release()
    assert (tmp_path / ".lock").read_text() == "another's"


def test_an_earlier_versions_lock_is_respected(tmp_path: Path, hold: Holder) -> None:
    """It was a POSIX lock, which flock ignores."""
    owner = hold(
        source="""
import fcntl, os, sys, time
os.mkdir(sys.argv[1])
file = open(sys.argv[1] + "/.lock", "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print("locked", flush=True)
time.sleep(60)
"""
    )
    lock = RunLock(tmp_path / "run")
    for attempt in (lock.check, lock.acquire):
        with pytest.raises(InputError, match="in use by process"):
            attempt()
    kill(owner)
    lock.acquire()


def test_a_living_owner_that_lost_its_lock_is_respected(tmp_path: Path, hold: Holder) -> None:
    hold("os.closerange(3, 100)")
    with pytest.raises(InputError, match="in use by process"):
        RunLock(tmp_path / "run").acquire()


def test_a_refused_process_leaves_no_empty_file(tmp_path: Path, hold: Holder) -> None:
    """The owner's file is missing, as for a moment at its release, but it still holds the lock on the directory."""
    hold("os.unlink(sys.argv[1] + '/.lock')")
    with pytest.raises(InputError, match="in use by process"):
        RunLock(tmp_path / "run").acquire()
    assert not (tmp_path / "run" / ".lock").exists()


def test_the_lock_has_one_owner_at_a_time(tmp_path: Path) -> None:
    """Eight processes acquire and release the lock, and the folder that the first of them creates."""
    code = """
import os, sys, time
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.lock import RunLock
count, end = 0, time.monotonic() + 1.5
while time.monotonic() < end:
    lock = RunLock(sys.argv[1] + "/run")
    try:
        lock.acquire()
    except InputError:
        continue
    os.close(os.open(sys.argv[1] + "/inside", os.O_CREAT | os.O_EXCL))
    os.unlink(sys.argv[1] + "/inside")
    lock.release()
    count += 1
print(count)
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(8)
    ]
    counts = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 8
    assert sum(map(int, counts)) > 20
    assert not (tmp_path / "run" / ".lock").exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL])
def test_without_locks_in_the_file_system_the_owners_process_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    disable_locks(monkeypatch, number)
    first = RunLock(tmp_path)
    first.acquire()
    with pytest.raises(InputError, match=f"process {os.getpid()} on host"):
        RunLock(tmp_path).acquire()
    owner = read_owner(tmp_path)
    (tmp_path / ".lock").write_text(json.dumps(owner | {"ticks": "1"}))  # another process has the process id now
    RunLock(tmp_path).acquire()
    for elsewhere in ({"host": "elsewhere", "pid": 7}, {"namespace": "pid:[1]", "pid": 7}):
        (tmp_path / ".lock").write_text(json.dumps(owner | elsewhere))
        with pytest.raises(InputError, match=r"process 7 on host .*delete the file \.lock"):
            RunLock(tmp_path).acquire()
    for damaged in ("", "[]", "{", '{"pid": 1}' * 2):
        (tmp_path / ".lock").write_text(damaged)
        RunLock(tmp_path).acquire()


def test_without_locks_a_killed_owner_is_dead_before_its_parent_reaps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holder: subprocess.Popen
) -> None:
    disable_locks(monkeypatch, errno.ENOLCK)
    with pytest.raises(InputError, match=f"process {holder.pid} on host"):
        RunLock(tmp_path / "run").acquire()
    os.kill(holder.pid, signal.SIGKILL)
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # a zombie
    RunLock(tmp_path / "run").acquire()


def test_without_locks_the_later_of_two_simultaneous_starts_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disable_locks(monkeypatch, errno.ENOLCK)

    def another(_seconds: float) -> None:
        (tmp_path / ".lock").write_text(json.dumps({"host": "elsewhere", "pid": 7}))

    monkeypatch.setattr(lock_module.time, "sleep", another)
    with pytest.raises(InputError, match="process 7 on host elsewhere"):
        RunLock(tmp_path).acquire()


def test_a_folder_created_for_the_lock_is_removed_with_it(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "new")
    lock.acquire()
    lock.release()
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_created_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to"):
        RunLock(tmp_path / "file" / "run").acquire()
    makers = (Path.mkdir, os.mkfifo, lambda path: path.symlink_to(path.name))
    for number, make in enumerate(makers):
        run = tmp_path / f"run{number}"
        run.mkdir()
        make(run / ".lock")
        with pytest.raises(InputError, match=r"\.lock is not a regular file.* move it away"):
            RunLock(run).acquire()


def test_a_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(InputError, match=r"cannot write to .*No space left"):
        RunLock(tmp_path / "run").acquire()
