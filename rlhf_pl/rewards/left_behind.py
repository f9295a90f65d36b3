"""Rewards that end the process, copy it, or leave threads and processes running which Python awaits at its end."""

import atexit
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import active_children
from multiprocessing.process import BaseProcess

LEFT_S = 10.0  # seconds that threads which a reward has left behind may go on after the command has done its work
_exit = os._exit
_calls = threading.local()
_left: list[threading.Thread | BaseProcess] = []


@contextmanager
def contained() -> Iterator[None]:
    """In which `os._exit` raises SystemExit, a copy that `os.fork` makes ends, and threads that are left are noted."""
    process, outer = os.getpid(), getattr(_calls, "process", None)
    before = _running()
    _calls.process, os._exit = process, _exit_call  # type: ignore[assignment]
    try:
        yield
    finally:
        if os.getpid() != process:  # a copy has come back, and would train beside the run
            _exit(1)
        _calls.process = outer
        if threading.current_thread() is threading.main_thread():  # elsewhere the run may have started them
            _left[:] = [one for one in _left if one.is_alive()]
            _left.extend(one for one in _running() - before if not one.daemon)


def _running() -> set[threading.Thread | BaseProcess]:
    running: set[threading.Thread | BaseProcess] = {*threading.enumerate()}
    return running.union(active_children())


def _exit_call(status: int) -> None:
    """Instead of `os._exit`: the call of a reward ends, but not the process that it runs in."""
    if getattr(_calls, "process", None) == os.getpid():
        raise SystemExit(status)
    _exit(status)


def end_at_last(status: int) -> None:
    """Have the process end soon, with this exit code, though rewards have left something running that Python awaits."""
    if any(one.is_alive() for one in _left):
        threading.Thread(target=_end, args=(status,), name="end", daemon=True).start()


def _end(status: int) -> None:
    until = time.monotonic() + LEFT_S
    while time.monotonic() < until:
        time.sleep(0.1)
        if not any(one.is_alive() for one in _left):
            return
    names = ", ".join(one.name for one in _left if one.is_alive())
    with suppress(Exception):  # standard error may be closed
        sys.stderr.write(f"The reward has left behind what does not end, and is ended with this command: {names}.\n")
    for one in _left:
        if isinstance(one, BaseProcess):
            one.kill()
    if any(isinstance(one, threading.Thread) and one.is_alive() for one in _left):
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        _exit(status)
