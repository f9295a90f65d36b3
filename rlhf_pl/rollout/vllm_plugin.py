"""What a running `vllm serve` loads of this package: a way for weights into it that needs no GPU."""

import contextlib
import socket

BACKEND = "rlhf_pl"  # of `--weight-transfer-config`


def register() -> None:
    """Entry point of vLLM's general plugins, called in each of its processes, maybe more than once."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    with contextlib.suppress(ValueError):  # it is there already
        WeightTransferEngineFactory.register_engine(BACKEND, "rlhf_pl.rollout.vllm_receive", "TCPWeightTransferEngine")


def read_exactly(connection: socket.socket, buffer: memoryview) -> None:
    """Fill a buffer from a connection.

    Raises:
        ConnectionError: It was closed before.
    """
    while buffer:
        count = connection.recv_into(buffer)
        if not count:
            raise ConnectionError("the trainer has closed the connection for weights")
        buffer = buffer[count:]
