"""The trainer's end of the weight transfer, with workers and unknown clients, without vLLM."""

import contextlib
import random
import socket
import threading
import time
from collections.abc import Callable
from functools import partial

import pytest
import torch

from rlhf_pl.distributed.listener import join
from rlhf_pl.rollout.served_engine import ServedEngine
from rlhf_pl.rollout.weight_sync.plugin import read_exactly
from rlhf_pl.rollout.weight_sync.routes import WeightRoute
from rlhf_pl.rollout.weight_sync.transports import NCCLPush, TCPPush
from rlhf_pl.utils.errors import InputError
from tests.unknown_clients import KINDS, visit

WEIGHTS = [torch.arange(1000.0), torch.tensor([[1.5, -2.5]], dtype=torch.bfloat16), torch.tensor(3)]
BYTES = b"".join(bytes(t.reshape(-1).view(torch.uint8).tolist()) for t in WEIGHTS)


def worker(info: dict[str, object], received: list[bytes]) -> None:
    with join(str(info["address"]), int(str(info["port"])), str(info["token"])) as link:
        buffer = bytearray(len(BYTES))
        read_exactly(link, memoryview(buffer), time.monotonic() + 20)
        received.append(bytes(buffer))


def test_workers_get_the_weights_while_unknown_clients_connect() -> None:
    """Clients of every kind, before and between the workers; the port is closed once all workers have connected."""
    received: list[bytes] = []
    with contextlib.closing(TCPPush("127.0.0.1")) as push:
        info = push.init_info(0, 2)
        clients = [visit(kind, info["port"], info["token"], random.Random(0)) for kind in KINDS]
        threads = [threading.Thread(target=worker, args=(info, received)) for _ in range(2)]
        threads[0].start()
        clients += [visit(kind, info["port"], info["token"], random.Random(1)) for kind in KINDS]
        threads[1].start()
        start = time.monotonic()
        push.connect(2, lambda: None)
        assert time.monotonic() - start < 2
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", info["port"]), timeout=5)
        push.send(WEIGHTS)
        for thread in threads:
            thread.join(20)
        for client in clients:
            client.close()
    assert received == [BYTES, BYTES]


def test_sending_to_a_worker_that_does_not_read_times_out() -> None:
    with contextlib.closing(TCPPush("127.0.0.1", timeout_s=0.5)) as push:
        info = push.init_info(0, 1)
        with join("127.0.0.1", info["port"], info["token"]):
            push.connect(1, lambda: None)
            start = time.monotonic()
            with pytest.raises(TimeoutError):
                push.send([torch.zeros(2**25)])
            assert time.monotonic() - start < 3


def test_waiting_for_workers_that_do_not_connect_times_out() -> None:
    with (
        contextlib.closing(TCPPush("127.0.0.1", timeout_s=0.5)) as push,
        pytest.raises(TimeoutError, match="2 of 2 did not"),
    ):
        push.connect(2, lambda: None)


@pytest.mark.parametrize("kind", [TCPPush, NCCLPush])
def test_a_push_listens_only_at_its_address(kind: Callable[[str], object]) -> None:
    with pytest.raises(OSError):  # noqa: PT011 - the message is the operating system's
        kind("192.0.2.1")


def test_the_error_for_another_hosts_address_names_the_option() -> None:
    with pytest.raises(InputError) as refused:
        WeightRoute([], partial(TCPPush, "192.0.2.1"), "192.0.2.1").connect()
    assert "`rollout.sampler.address`: can't listen at 192.0.2.1" in str(refused.value)
    assert "an address of this host" in str(refused.value)


def test_servers_whose_workers_do_not_connect_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The servers have accepted the request: without a time limit the run would wait forever."""
    monkeypatch.setattr(ServedEngine, "call", lambda engine, path, *_, **__: 2)
    route = WeightRoute([ServedEngine("http://127.0.0.1:9", 0.5)], partial(TCPPush, "127.0.0.1", 0.5), "127.0.0.1")
    with pytest.raises(InputError) as refused:
        route.connect()
    assert not route.is_connected
    assert "not all workers of the servers connected to the trainer at 127.0.0.1: 2 of 2" in str(refused.value)


@pytest.mark.parametrize(("pause", "error"), [(0.1, TimeoutError), (None, ConnectionError)])
def test_reading_has_one_deadline(pause: float | None, error: type[Exception]) -> None:
    """Single bytes do not extend it."""
    reader, writer = socket.socketpair()

    def send_slowly() -> None:
        with contextlib.suppress(OSError):
            writer.sendall(b"x")
            while pause is not None:
                time.sleep(pause)
                writer.sendall(b"x")
        writer.close()

    thread = threading.Thread(target=send_slowly)
    thread.start()
    start = time.monotonic()
    with reader, pytest.raises(error):
        read_exactly(reader, memoryview(bytearray(1000)), time.monotonic() + 0.5)
    assert time.monotonic() - start < 1.5
    thread.join()
