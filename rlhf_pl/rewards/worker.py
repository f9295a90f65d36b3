"""The process that an isolated reward function runs in: `python -m rlhf_pl.rewards.worker PATH DESCRIPTOR`.

It takes pickled batches of samples from its parent, and gives back plain JSON, so that nothing a function returns is
run in the parent. It ends with its parent, whatever the function is doing.
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
from rlhf_pl.rewards.results import failure_of, scores_of

_PR_SET_PDEATHSIG = 1


def main(path: str, descriptor: int) -> None:
    """Score batches until the parent hangs up."""
    parent = os.getppid()
    _end_with_parent(parent)
    connection = Connection(descriptor)
    try:
        reward = FunctionReward(path)
    except BaseException as error:  # users' code may raise anything
        _send(connection, {"failed": asdict(failure_of(error))})
        return
    _send(connection, {"ready": True})
    while True:
        try:
            batch = connection.recv()
        except (EOFError, OSError):
            return
        try:
            outcomes = scores_of(reward, batch)
        except BaseException as error:  # users' code may raise anything
            _send(connection, {"failed": asdict(failure_of(error))})
        else:
            _send(connection, {"outcomes": [[isinstance(o, Failure), asdict(o)] for o in outcomes]})


def _send(connection: Connection, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # the parent has gone, which the next `recv` tells
        connection.send_bytes(json.dumps(message).encode())


def _end_with_parent(parent: int) -> None:
    """By the kernel where it can, and by a thread that looks every second."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    gone = threading.Event()

    def look() -> None:
        while os.getppid() == parent:
            gone.wait(1.0)
        os.killpg(0, signal.SIGKILL)  # with what the function has started

    threading.Thread(target=look, name="parent", daemon=True).start()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
