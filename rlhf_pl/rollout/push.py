"""The trainer's end of vLLM's weight transfer: bytes on their way to the workers of running servers."""

import secrets
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from rlhf_pl.rollout.vllm_plugin import BACKEND, read_exactly


class Push(Protocol):
    """A way to the workers of all servers. The servers are told of it over HTTP, the tensors go past that."""

    backend: str  # what the servers were started with

    def init_info(self, first_worker: int, workers: int) -> dict[str, Any]:
        """What a server is told whose first worker has that number, of all `workers`."""

    def connect(self, workers: int, check: Callable[[], None]) -> None:
        """Until all workers are there; `check` is called now and then, and raises if they can't come."""

    def send(self, tensors: Sequence[Tensor]) -> None:
        """To all workers, in this order."""

    def close(self) -> None:
        """The workers go on without."""


class TCPPush:
    """Plain connections, for servers anywhere, with or without a GPU; this package must be installed there too.

    Args:
        address: Where the servers' workers reach this process.
    """

    backend = BACKEND

    def __init__(self, address: str) -> None:
        self._address, self._token = address, secrets.token_hex(16)
        self._listener = socket.create_server(("", 0))
        self._connections: list[socket.socket] = []
        self._threads: ThreadPoolExecutor | None = None

    def init_info(self, first_worker: int, workers: int) -> dict[str, Any]:
        return {"address": self._address, "port": self._listener.getsockname()[1], "token": self._token}

    def connect(self, workers: int, check: Callable[[], None]) -> None:
        self._listener.settimeout(0.5)
        while len(self._connections) < workers:
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                check()
                continue
            connection.settimeout(10)
            word = bytearray(len(self._token))
            try:
                read_exactly(connection, memoryview(word))
            except OSError:
                word.clear()
            if not secrets.compare_digest(bytes(word), self._token.encode()):
                connection.close()
                continue
            connection.settimeout(None)
            self._connections.append(connection)
        self._threads = ThreadPoolExecutor(workers)

    def send(self, tensors: Sequence[Tensor]) -> None:
        assert self._threads is not None
        parts = [t.cpu().contiguous().view(-1).view(torch.uint8).numpy().data for t in tensors]

        def to(connection: socket.socket) -> None:
            for part in parts:
                connection.sendall(part)

        list(self._threads.map(to, self._connections))

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        self._listener.close()
        if self._threads is not None:
            self._threads.shutdown(wait=False)


class NCCLPush:
    """vLLM's own engine for GPUs that NCCL connects; no GPU of the trainer's may be a server's.

    Args:
        address: Where the servers' workers reach this process.
    """

    backend = "nccl"

    def __init__(self, address: str) -> None:
        with socket.create_server(("", 0)) as free:
            self._rendezvous = {"master_address": address, "master_port": free.getsockname()[1]}
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
