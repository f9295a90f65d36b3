"""The trainer's end of vLLM's weight transfer: bytes on their way to the workers of running servers."""

import contextlib
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from rlhf_pl.distributed.listener import Listener, make_token
from rlhf_pl.rollout.background import at_once
from rlhf_pl.rollout.weight_sync.plugin import BACKEND, PART_SECONDS, left


class Push(Protocol):
    """A way to the workers of all servers. The servers are told of it over HTTP, the tensors go past that."""

    backend: str  # what the servers were started with

    def init_info(self, first_worker: int, workers: int) -> dict[str, Any]:
        """What a server is told whose first worker has that number, of all `workers`."""

    def connect(self, workers: int, check: Callable[[], None]) -> None:
        """Until all workers are there; `check` is called now and then, and raises if they can't come.

        Raises:
            OSError: They did not come in time.
        """

    def send(self, tensors: Sequence[Tensor]) -> None:
        """To all workers, in this order.

        Raises:
            OSError: A worker has gone, or does not read.
        """

    def close(self) -> None:
        """The workers go on without."""


class TCPPush:
    """Plain connections, for servers anywhere, with or without a GPU; this package must be installed there too.

    Args:
        address: Of this host, where the servers' workers reach it; the port is open there alone, until all have come.
        timeout_s: Seconds until all workers must have connected, and for a part of the weights to reach a worker.

    Raises:
        OSError: The address is not one of this host.
    """

    backend = BACKEND

    def __init__(self, address: str, timeout_s: float = PART_SECONDS) -> None:
        self._address, self._timeout_s, self._token = address, timeout_s, make_token()
        self._listener = Listener(address, "the servers' workers")
        self._port = self._listener.port
        self._connections: list[socket.socket] = []

    def init_info(self, first_worker: int, workers: int) -> dict[str, Any]:
        return {"address": self._address, "port": self._port, "token": self._token, "timeout_s": self._timeout_s}

    def connect(self, workers: int, check: Callable[[], None]) -> None:
        self._connections = self._listener.accept_peers([self._token] * workers, self._timeout_s, check)
        self._listener.close()

    def send(self, tensors: Sequence[Tensor]) -> None:
        parts = [t.cpu().contiguous().view(-1).view(torch.uint8).numpy().data for t in tensors]
        end = time.monotonic() + self._timeout_s

        def to(connection: socket.socket) -> None:
            for part in parts:
                connection.settimeout(left(end))
                connection.sendall(part)

        at_once(to, self._connections)

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        self._listener.close()


class NCCLPush:
    """vLLM's own engine for GPUs that NCCL connects; no GPU of the trainer's may be a server's.

    The rendezvous at `address` is vLLM's own: it asks for no token, so it belongs on a network that is trusted.

    Args:
        address: Of this host, where the servers' workers reach it.
        timeout_s: Of no effect here; vLLM and NCCL have limits of their own.

    Raises:
        OSError: The address is not one of this host.
    """

    backend = "nccl"

    def __init__(self, address: str, timeout_s: float = PART_SECONDS) -> None:
        with contextlib.closing(Listener(address, "the servers' workers")) as free:
            self._rendezvous = {"master_address": address, "master_port": free.port}
        self._group: Any = None

    def init_info(self, first_worker: int, workers: int) -> dict[str, Any]:
        return {**self._rendezvous, "rank_offset": 1 + first_worker, "world_size": 1 + workers}

    def connect(self, workers: int, check: Callable[[], None]) -> None:
        from vllm.distributed.weight_transfer.nccl_common import trainer_init

        time.sleep(0.5)
        check()
        self._group = trainer_init(self.init_info(0, workers))

    def send(self, tensors: Sequence[Tensor]) -> None:
        device, stream = torch.device("cuda", torch.cuda.current_device()), torch.cuda.current_stream()
        for tensor in tensors:
            self._group.broadcast(tensor.to(device).contiguous(), src=0, stream=stream)
        stream.synchronize()

    def close(self) -> None:
        if self._group is not None:
            self._group.destroy()
