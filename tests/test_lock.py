import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_pl.errors import InputError
from rlhf_pl.lock import RunLock

HOLD = """
import sys, time
from rlhf_pl.lock import RunLock
RunLock(sys.argv[1]).acquire()
print("locked", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_process_is_told_who_has_the_directory(tmp_path: Path, holder: subprocess.Popen) -> None:
    lock = RunLock(tmp_path / "run")
    for attempt in (lock.check, lock.acquire):
        with pytest.raises(InputError) as error:
            attempt()
        assert f"process {holder.pid} on host {socket.gethostname()}" in str(error.value)


def test_a_dead_owners_lock_is_recognised(tmp_path: Path, holder: subprocess.Popen) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / ".lock").exists()
    lock = RunLock(tmp_path / "run")
    lock.check()
    lock.acquire()
    assert json.loads((tmp_path / "run" / ".lock").read_text())["pid"] == os.getpid()
    lock.release()
    assert not (tmp_path / "run" / ".lock").exists()


def test_without_locks_in_the_file_system_the_owners_process_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*args: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.lockf", unsupported)
    first = RunLock(tmp_path)
    first.acquire()
    with pytest.raises(InputError, match=f"process {os.getpid()} on host"):
        RunLock(tmp_path).acquire()
    owner = json.loads((tmp_path / ".lock").read_text())
    (tmp_path / ".lock").write_text(json.dumps(owner | {"ticks": "1"}))  # the process id is another process's by now
    RunLock(tmp_path).acquire()
    (tmp_path / ".lock").write_text(json.dumps(owner | {"host": "elsewhere", "pid": 7}))
    with pytest.raises(InputError, match=r"process 7 on host elsewhere.*delete the file \.lock"):
        RunLock(tmp_path).acquire()


def test_a_folder_made_for_the_lock_goes_with_it(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "new")
    lock.acquire()
    lock.release()
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to"):
        RunLock(tmp_path / "file" / "run").acquire()
