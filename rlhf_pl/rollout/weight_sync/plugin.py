"""The plugin of this package for `vllm serve`: registers a weight transfer that needs no GPU."""

import contextlib
import socket
import time

BACKEND = "rlhf_pl"  # of `--weight-transfer-config`
PART_TIMEOUT_S = 600.0  # for a part of the weights on a connection, unless the trainer sets another limit


def register() -> None:
    """Entry point of vLLM's general plugins; called in each of its processes, possibly more than once."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    with contextlib.suppress(ValueError):  # already registered
        WeightTransferEngineFactory.register_engine(
            BACKEND, "rlhf_pl.rollout.weight_sync.receive", "TCPWeightTransferEngine"
        )


def read_exactly(connection: socket.socket, buffer: memoryview, end: float) -> None:
    """Fill a buffer from a connection.

    Args:
        connection: The connection to the trainer.
        buffer: Bytes to fill.
        end: Deadline for the whole buffer, in `time.monotonic()` seconds.

    Raises:
        ConnectionError: The connection was closed early.
        TimeoutError: The deadline has passed.
    """
    while buffer:
        connection.settimeout(seconds_left(end))
        count = connection.recv_into(buffer)
        if not count:
            raise ConnectionError("the trainer has closed the connection for weights")
        buffer = buffer[count:]


def seconds_left(end: float) -> float:
    """Seconds until a deadline in `time.monotonic()` seconds.

    Raises:
        TimeoutError: The deadline has passed.
    """
    seconds = end - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("the weights took longer than the time limit")
    return seconds
