"""What a running `vllm serve` loads of this package: a way for weights into it that needs no GPU."""

import contextlib
import socket
import time

BACKEND = "rlhf_pl"  # of `--weight-transfer-config`
PART_SECONDS = 600.0  # for a part of the weights on a connection, where the trainer gives no other limit


def register() -> None:
    """Entry point of vLLM's general plugins, called in each of its processes, maybe more than once."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    with contextlib.suppress(ValueError):  # it is there already
        WeightTransferEngineFactory.register_engine(
            BACKEND, "rlhf_pl.rollout.weight_sync.receive", "TCPWeightTransferEngine"
        )


def read_exactly(connection: socket.socket, buffer: memoryview, end: float) -> None:
    """Fill a buffer from a connection.

    Args:
        connection: To the trainer.
        buffer: Bytes.
        end: Moment of `time.monotonic()` until which all must have come, however it comes.

    Raises:
        ConnectionError: It was closed before.
        TimeoutError: It was slower.
    """
    while buffer:
        connection.settimeout(left(end))
        count = connection.recv_into(buffer)
        if not count:
            raise ConnectionError("the trainer has closed the connection for weights")
        buffer = buffer[count:]


def left(end: float) -> float:
    """Seconds until a moment of `time.monotonic()`.

    Raises:
        TimeoutError: It is over.
    """
    seconds = end - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("the weights took longer than the time limit")
    return seconds
