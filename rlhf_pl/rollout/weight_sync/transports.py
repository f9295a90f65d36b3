"""The trainer's end of vLLM's weight transfer: sends bytes to the workers of running servers."""

import contextlib
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from rlhf_pl.distributed.listener import Listener, make_token
from rlhf_pl.rollout.background import run_parallel
from rlhf_pl.rollout.weight_sync.plugin import BACKEND, PART_TIMEOUT_S, seconds_left


class Push(Protocol):
    """Connections to the workers of servers. The servers get its `init_info` over HTTP, and the tensors directly."""

    backend: str  # of the weight transfer that the servers were started with

    def init_info(self, first_worker: int, workers: int) -> dict[str, Any]:
        """The connection settings for a server.

        Args:
            first_worker: Index of the server's first worker among those of all servers.
            workers: Number of workers of all servers.
        """

    def connect(self, workers: int, check: Callable[[], None]) -> None:
        """Wait until all workers have connected; `check` is called repeatedly and raises if they can't connect.

        Raises:
            OSError: They did not connect in time.
        """

    def send(self, tensors: Sequence[Tensor]) -> None:
        """Send tensors to all workers, in this order.

        Raises:
            OSError: A worker has disconnected, or does not read.
        """

    def close(self) -> None:
        """Disconnect from the workers."""


class TCPPush:
    """Plain connections, for servers on any host, with or without a GPU; they need this package, too.

    Args:
        address: Address of this host at which the servers' workers reach it; the port is open only there, and only
            until all workers have connected.
        timeout_s: Seconds until all workers must have connected, and for a part of the weights to reach a worker.

    Raises:
        OSError: The address is not one of this host.
    """

    backend = BACKEND

    def __init__(self, address: str, timeout_s: float = PART_TIMEOUT_S) -> None:
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

        def send_parts(connection: socket.socket) -> None:
            for part in parts:
                connection.settimeout(seconds_left(end))
                connection.sendall(part)

        run_parallel(send_parts, self._connections)

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        self._listener.close()


class NCCLPush:
    """vLLM's own weight transfer for GPUs that NCCL connects; the trainer and the servers must not share a GPU.

    The rendezvous at `address` is vLLM's own: it requires no token, so use it only in a trusted network.

    Args:
        address: Address of this host at which the servers' workers reach it.
        timeout_s: Not used here; vLLM and NCCL have their own limits.

    Raises:
        OSError: The address is not one of this host.
    """

    backend = "nccl"

    def __init__(self, address: str, timeout_s: float = PART_TIMEOUT_S) -> None:
        with contextlib.closing(Listener(address, "the servers' workers")) as listener:
            self._rendezvous = {"master_address": address, "master_port": listener.port}
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
