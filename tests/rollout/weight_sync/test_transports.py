"""The trainer's end of the weight transfer against workers and strangers, without vLLM."""

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
from tests.strangers import KINDS, visit

WEIGHTS = [torch.arange(1000.0), torch.tensor([[1.5, -2.5]], dtype=torch.bfloat16), torch.tensor(3)]
BYTES = b"".join(bytes(t.reshape(-1).view(torch.uint8).tolist()) for t in WEIGHTS)


def worker(info: dict[str, object], received: list[bytes]) -> None:
    with join(str(info["address"]), int(str(info["port"])), str(info["token"])) as link:
        buffer = bytearray(len(BYTES))
        read_exactly(link, memoryview(buffer), time.monotonic() + 20)
        received.append(bytes(buffer))


def test_workers_get_the_weights_while_strangers_come() -> None:
    """Of every kind, before the workers and between them; the port is closed once all workers have come."""
    received: list[bytes] = []
    with contextlib.closing(TCPPush("127.0.0.1")) as push:
        info = push.init_info(0, 2)
        strangers = [visit(kind, info["port"], info["token"], random.Random(0)) for kind in KINDS]
        threads = [threading.Thread(target=worker, args=(info, received)) for _ in range(2)]
        threads[0].start()
        strangers += [visit(kind, info["port"], info["token"], random.Random(1)) for kind in KINDS]
        threads[1].start()
        start = time.monotonic()
        push.connect(2, lambda: None)
        assert time.monotonic() - start < 2
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", info["port"]), timeout=5)
        push.send(WEIGHTS)
        for thread in threads:
            thread.join(20)
        for stranger in strangers:
            stranger.close()
    assert received == [BYTES, BYTES]


def test_a_worker_that_does_not_read_is_given_up_in_time() -> None:
    with contextlib.closing(TCPPush("127.0.0.1", timeout_s=0.5)) as push:
        info = push.init_info(0, 1)
        with join("127.0.0.1", info["port"], info["token"]):
            push.connect(1, lambda: None)
            start = time.monotonic()
            with pytest.raises(TimeoutError):
                push.send([torch.zeros(2**25)])
            assert time.monotonic() - start < 3


def test_workers_that_do_not_come_are_missed_in_time() -> None:
    with (
        contextlib.closing(TCPPush("127.0.0.1", timeout_s=0.5)) as push,
        pytest.raises(TimeoutError, match="2 of 2 did not"),
    ):
        push.connect(2, lambda: None)


@pytest.mark.parametrize("kind", [TCPPush, NCCLPush])
def test_it_listens_at_its_address_alone(kind: Callable[[str], object]) -> None:
    with pytest.raises(OSError):  # noqa: PT011 - the system's own words
        kind("192.0.2.1")


def test_an_address_of_another_host_is_refused_with_the_option() -> None:
    with pytest.raises(InputError) as refused:
        WeightRoute([], partial(TCPPush, "192.0.2.1"), "192.0.2.1").connect()
    assert "`rollout.sampler.address`: can't listen at 192.0.2.1" in str(refused.value)
    assert "an address of this host" in str(refused.value)


def test_servers_whose_workers_do_not_come_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have answered that they would: without a limit the run would wait for good."""
    monkeypatch.setattr(ServedEngine, "call", lambda engine, path, *_, **__: 2)
    route = WeightRoute([ServedEngine("http://127.0.0.1:9", 0.5)], partial(TCPPush, "127.0.0.1", 0.5), "127.0.0.1")
    with pytest.raises(InputError) as missed:
        route.connect()
    assert not route.is_connected
    assert "not all workers of the servers came to the trainer at 127.0.0.1: 2 of 2" in str(missed.value)


@pytest.mark.parametrize(("pause", "error"), [(0.1, TimeoutError), (None, ConnectionError)])
def test_reading_ends_by_one_deadline(pause: float | None, error: type[Exception]) -> None:
    """A byte now and then does not put it off."""
    here, there = socket.socketpair()

    def drip() -> None:
        with contextlib.suppress(OSError):
            there.sendall(b"x")
            while pause is not None:
                time.sleep(pause)
                there.sendall(b"x")
        there.close()

    thread = threading.Thread(target=drip)
    thread.start()
    start = time.monotonic()
    with here, pytest.raises(error):
        read_exactly(here, memoryview(bytearray(1000)), time.monotonic() + 0.5)
    assert time.monotonic() - start < 1.5
    thread.join()
