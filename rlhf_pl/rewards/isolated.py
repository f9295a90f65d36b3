"""A reward function in a separate process, which can be killed and can crash without harm to the run."""

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
    """Scores batches in a worker process, which starts when needed and is killed if a call is interrupted.

    Args:
        path: The function's import path.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def open(self) -> None:
        """Start the process if it is not running.

        Raises:
            InputError: The process can't import the function.
        """
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        own_end, worker_end = socket.socketpair()
        with worker_end:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rlhf_pl.rewards.isolated_worker", self._path, str(worker_end.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[worker_end.fileno()],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
                start_new_session=True,  # so that it can be killed with its child processes
            )
        self._connection = Connection(own_end.detach())
        failure = None
        try:
            self._receive()
        except CallFailed as failed:
            failure = failed
        except (EOFError, OSError):
            failure = self._record_exit()
        except BaseException:
            self.close()
            raise
        if failure is not None:
            self.close()
            raise InputError(
                f"`rollout.scoring.isolate`: {self._path!r} can't run in a separate process: {failure.failure.detail}"
            )

    def score(self, batch: Sequence[Sample]) -> list[Outcome]:
        """Score a batch: one outcome per sample.

        Raises:
            CallFailed: The function raised, returned an invalid value, or its process exited.
        """
        self.open()
        assert self._connection is not None
        try:
            self._connection.send(list(batch))
            message = self._receive()
        except CallFailed:
            raise
        except (EOFError, OSError) as error:
            raise self._record_exit() from error
        except BaseException:  # for example an interrupt: the result is not needed any more
            self.close()
            raise
        return [Failure(**o) if failed else RewardResult(**o) for failed, o in message["outcomes"]]

    def _receive(self) -> dict[str, Any]:
        assert self._connection is not None
        message: dict[str, Any] = json.loads(self._connection.recv_bytes())
        if "failed" in message:
            raise CallFailed(Failure(**message["failed"]))
        return message

    def _record_exit(self) -> CallFailed:
        process = self._process
        if process is not None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(5.0)  # to get its exit code
        self.close()
        code = None if process is None else process.returncode
        how = (
            f"was killed by {signal.Signals(-code).name}"
            if code is not None and code < 0
            else f"exited with status {code}"
        )
        return CallFailed(Failure("exception", f"the function's process {how} without a result."))

    def close(self) -> None:
        """Kill the process and its child processes."""
        process, self._process = self._process, None
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if process is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
