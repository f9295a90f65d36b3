"""Containment of rewards that exit or fork the process, or leave threads and child processes running.

Python waits for such threads and processes before it exits.
"""

import atexit
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import active_children
from multiprocessing.process import BaseProcess

LEFTOVER_GRACE_S = 10.0  # time that leftovers of rewards may keep running after the command has finished
_exit = os._exit
_calls = threading.local()
_leftovers: list[threading.Thread | BaseProcess] = []


@contextmanager
def contain_process_exit() -> Iterator[None]:
    """In the block, `os._exit` raises SystemExit; at its end, forked copies exit, and new threads are recorded."""
    process, outer = os.getpid(), getattr(_calls, "process", None)
    before = _running_tasks()
    _calls.process, os._exit = process, _raise_system_exit  # type: ignore[assignment]
    try:
        yield
    finally:
        if os.getpid() != process:  # a forked copy, which would train as a second run
            _exit(1)
        _calls.process = outer
        if threading.current_thread() is threading.main_thread():  # in other threads, the run may have started them
            _leftovers[:] = [task for task in _leftovers if task.is_alive()]
            _leftovers.extend(task for task in _running_tasks() - before if not task.daemon)


def _running_tasks() -> set[threading.Thread | BaseProcess]:
    running: set[threading.Thread | BaseProcess] = {*threading.enumerate()}
    return running.union(active_children())


def _raise_system_exit(status: int) -> None:
    """Replacement of `os._exit`: ends the call of a reward, but not its process."""
    if getattr(_calls, "process", None) == os.getpid():
        raise SystemExit(status)
    _exit(status)


def exit_despite_leftovers(status: int) -> None:
    """Exit with this status after `LEFTOVER_GRACE_S`, even if leftovers of rewards are still running."""
    if any(task.is_alive() for task in _leftovers):
        threading.Thread(target=_exit_after_grace, args=(status,), name="exit", daemon=True).start()


def _exit_after_grace(status: int) -> None:
    until = time.monotonic() + LEFTOVER_GRACE_S
    while time.monotonic() < until:
        time.sleep(0.1)
        if not any(task.is_alive() for task in _leftovers):
            return
    names = ", ".join(task.name for task in _leftovers if task.is_alive())
    with suppress(Exception):  # standard error may be closed
        sys.stderr.write(f"The command has finished, so what the reward left running is stopped: {names}.\n")
    for task in _leftovers:
        if isinstance(task, BaseProcess):
            task.kill()
    if any(isinstance(task, threading.Thread) and task.is_alive() for task in _leftovers):
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        _exit(status)
