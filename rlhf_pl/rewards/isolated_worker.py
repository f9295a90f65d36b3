"""The worker process of an isolated reward function: `python -m rlhf_pl.rewards.isolated_worker PATH DESCRIPTOR`.

It receives pickled batches of samples from its parent and returns JSON, so that the parent never unpickles what a
function returns. It exits with its parent, whatever the function is doing.
"""

import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any

from rlhf_pl.rewards.base import Failure
from rlhf_pl.rewards.function import FunctionReward
from rlhf_pl.rewards.results import make_failure, score_copies

_PR_SET_PDEATHSIG = 1


def main(path: str, descriptor: int) -> None:
    """Score batches until the parent closes the connection."""
    parent = os.getppid()
    _exit_with_parent(parent)
    connection = Connection(descriptor)
    try:
        reward = FunctionReward(path)
    except BaseException as error:  # users' code may raise anything
        _send(connection, {"failed": asdict(make_failure(error))})
        return
    _send(connection, {"ready": True})
    while True:
        try:
            batch = connection.recv()
        except (EOFError, OSError):
            return
        try:
            outcomes = score_copies(reward, batch)
        except BaseException as error:  # users' code may raise anything
            _send(connection, {"failed": asdict(make_failure(error))})
        else:
            _send(connection, {"outcomes": [[isinstance(o, Failure), asdict(o)] for o in outcomes]})


def _send(connection: Connection, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # the parent has exited; the next `recv` fails
        connection.send_bytes(json.dumps(message).encode())


def _exit_with_parent(parent: int) -> None:
    """Exit when the parent does: by a signal from the kernel on Linux, and by a thread that checks every second."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    pause = threading.Event()

    def watch_parent() -> None:
        while os.getppid() == parent:
            pause.wait(1.0)
        os.killpg(0, signal.SIGKILL)  # with the function's child processes

    threading.Thread(target=watch_parent, name="parent", daemon=True).start()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
