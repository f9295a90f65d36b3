"""The ranks' watch with unknown clients, and with lines that are not messages."""

import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from rlhf_pl.distributed import failure_watch as module
from rlhf_pl.distributed.addresses import seen_from_others
from rlhf_pl.distributed.failure_watch import MAX_LINE, MAX_REASON, RankWatch
from rlhf_pl.utils.errors import InputError
from tests.unknown_clients import KINDS, visit

NONSENSE = {
    "not JSON": b"hello\n",
    "empty": b"\n",
    "not UTF-8": b'{"at": "\xff\xfe"}\n',
    "not an object": b'[1]\n5\nnull\n"at"\n',
    "deeply nested": b"[" * 100_000 + b"\n",
    "deeply nested objects": b'{"at":' * 15_000 + b"\n",
    "an endless number": b'{"code": ' + b"9" * 100_000 + b"}\n",
    "too long": b'{"at": "' + b"x" * 10 * MAX_LINE + b'"}\n',
    "too long, with a message at its end": b"x" * MAX_LINE + b'{"failed": "no", "code": 1}\n',
    "unknown keys": b'{"token": "x", "rank": 1}\n',
    "a place that is a list": b'{"at": ["x"]}\n',
    "a failure without a code": b'{"failed": "no"}\n',
    "a failure with a text for a code": b'{"failed": "no", "code": "1"}\n',
    "a failure with exit code 0": b'{"failed": "no", "code": 0}\n',
    "a failure with an impossible code": b'{"failed": "no", "code": 256}\n',
    "a failure without a text": b'{"failed": {}, "code": 1}\n',
    "a name that is a number": b'{"is": 7}\n',
    "goodbye with a number": b'{"bye": 1}\n',
}


@contextmanager
def watching(
    size: int, before: Callable[[int, list[str]], None] = lambda port, tokens: None
) -> Iterator[list[RankWatch]]:
    """The watches of all ranks in this process; `before` is called when rank 0 listens, before the first connection."""
    shared: list[Any] = []
    ready = threading.Event()

    def share(value: Any) -> Any:
        if value is not None:
            shared.append(value)
            before(value[1], value[0])
            ready.set()
        assert ready.wait(20)
        return shared[0]

    with ThreadPoolExecutor(size) as pool:
        watches = list(pool.map(lambda rank: RankWatch(rank, size, share, "", True), range(size)))
    try:
        yield watches
    finally:
        for watch in reversed(watches):
            watch.close()
        wait_until(lambda: len(watches[0]._done) == size - 1)
        for watch in watches:
            for link in watch._links.values():
                link.close()


def wait_until(holds: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_ranks_connect_among_unknown_clients(capsys: pytest.CaptureFixture[str]) -> None:
    """Clients of every kind connect before the first rank; none of them replaces or delays a rank."""
    connections = []

    def connect_clients(port: int, tokens: list[str]) -> None:
        connections.extend(visit(kind, port, tokens[1], random.Random(0)) for kind in KINDS)

    start = time.monotonic()
    with watching(3, connect_clients) as watches:
        assert time.monotonic() - start < 5
        watches[1].report_phase("scoring responses")
        watches[2].report_phase("training")
        wait_until(lambda: watches[0].places == {1: "scoring responses", 2: "training"})
        assert watches[0]._names[2].startswith("rank 2 (process ")
    for connection in connections:
        connection.close()
    output = capsys.readouterr().out
    assert output.count("was rejected") == 1
    assert f"{len(KINDS)} connections were rejected in all" in output


@pytest.mark.parametrize("to", [0, 1])
@pytest.mark.parametrize("kind", NONSENSE)
def test_a_line_that_is_not_a_message_is_ignored(kind: str, to: int, capsys: pytest.CaptureFixture[str]) -> None:
    with watching(2) as watches:
        other = 1 - to
        watches[other]._links[to].sendall(NONSENSE[kind] * 2)
        watches[other]._send_to_all({"at": "training"})
        wait_until(lambda: watches[to].places.get(other) == "training")
    assert capsys.readouterr().out.count("is not a message of this run") == 1


@pytest.mark.parametrize("seed", range(5))
def test_random_lines_are_ignored(seed: int) -> None:
    rng = random.Random(seed)
    with watching(2) as watches:
        for _ in range(200):
            watches[1]._links[0].sendall(rng.randbytes(rng.randrange(300)))
        watches[1]._links[0].sendall(b"\n")
        watches[1].report_phase("training")
        wait_until(lambda: watches[0].places.get(1) == "training")


def test_a_failure_of_any_length_fits_a_message() -> None:
    """Even if JSON writes each of its characters as twelve."""
    line = json.dumps({"failed": ("\U0001f600" * 10**6)[:MAX_REASON], "code": 1}).encode() + b"\n"
    assert len(line) < MAX_LINE
    assert module._message(line) is not None


def test_an_address_of_another_host_is_refused_by_all_ranks() -> None:
    shared: list[Any] = []
    with pytest.raises(InputError, match=r"Rank 0 can't listen at 192\.0\.2\.1") as refused:
        RankWatch(0, 2, lambda value: shared.append(value) or value, "192.0.2.1", False)
    assert "MASTER_ADDR" in str(refused.value)
    with pytest.raises(InputError, match=r"Rank 0 can't listen at 192\.0\.2\.1"):
        RankWatch(1, 2, lambda _: shared[0], "192.0.2.1", False)


def test_a_rank_that_cannot_reach_rank_0_is_named() -> None:
    with pytest.raises(InputError, match=r"Rank 1 can't reach rank 0 at 127\.0\.0\.1, port 9: Connection refused"):
        RankWatch(1, 2, lambda _: (["0" * 32] * 2, 9, ""), "127.0.0.1", False)


def test_ranks_that_do_not_connect_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "JOIN_SECONDS", 0.3)
    with pytest.raises(InputError, match=r"but 2 of 2 did not connect in 0\.3 s"):
        RankWatch(0, 3, lambda value: value, "", True)


@pytest.mark.parametrize(
    ("known_as", "expected"),
    [
        (["127.0.1.1", "127.0.1.1", "10.0.0.7", "10.0.0.7"], "10.0.0.7"),  # a host whose name resolves to a loopback
        (["10.0.0.7", "10.0.0.7"], "10.0.0.7"),
        (["127.0.0.1", "127.0.0.1"], "127.0.0.1"),  # two agents on one host
        (["node-1", "node-1"], "node-1"),  # a name that can't be resolved is used as it is
        (["::1", "fd00::7"], "fd00::7"),
    ],
)
def test_rank_0_listens_at_the_address_that_other_hosts_see(known_as: list[str], expected: str) -> None:
    assert seen_from_others(known_as) == expected
