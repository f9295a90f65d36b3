"""A reward function in a process of its own, which can be killed, and takes nothing with it when it dies."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from rlhf_pl.rewards.base import Failure, RewardResult, Sample
from rlhf_pl.rewards.results import CallFailed, Outcome
from rlhf_pl.utils.errors import InputError


class IsolatedFunction:
    """Scores batches in a process, which is started when needed and killed when a call is interrupted.

    Args:
        path: The function's import path.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def open(self) -> None:
        """Start the process if none runs.

        Raises:
            InputError: The function can't be imported there.
        """
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rlhf_pl.rewards.worker", self._path, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
                start_new_session=True,  # so that it can be killed with what it starts
            )
        self._connection = Connection(ours.detach())
        failure = None
        try:
            self._receive()
        except CallFailed as failed:
            failure = failed
        except (EOFError, OSError):
            failure = self._died()
        except BaseException:
            self.close()
            raise
        if failure is not None:
            self.close()
            raise InputError(
                f"`rollout.scoring.isolate`: {self._path!r} can't be run in a process of its own: "
                f"{failure.failure.detail}"
            )

    def score(self, batch: Sequence[Sample]) -> list[Outcome]:
        """One outcome per sample.

        Raises:
            CallFailed: The function raised, returned something else, or its process died.
        """
        self.open()
        assert self._connection is not None
        try:
            self._connection.send(list(batch))
            message = self._receive()
        except CallFailed:
            raise
        except (EOFError, OSError) as error:
            raise self._died() from error
        except BaseException:  # such as an interrupt: nobody waits for what it is doing any more
            self.close()
            raise
        return [Failure(**o) if failed else RewardResult(**o) for failed, o in message["outcomes"]]

    def _receive(self) -> dict[str, Any]:
        assert self._connection is not None
        message: dict[str, Any] = json.loads(self._connection.recv_bytes())
        if "failed" in message:
            raise CallFailed(Failure(**message["failed"]))
        return message

    def _died(self) -> CallFailed:
        process = self._process
        if process is not None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(5.0)  # for its exit code
        self.close()
        code = None if process is None else process.returncode
        how = f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with {code}"
        return CallFailed(Failure("exception", f"the function's process {how}, without a result."))

    def close(self) -> None:
        """Kill the process, and what it has started."""
        process, self._process = self._process, None
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if process is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
