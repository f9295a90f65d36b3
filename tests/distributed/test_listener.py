"""Who is let in at a port of a run, and that strangers neither come in nor hold anybody up."""

import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from rlhf_pl.distributed import listener as module
from rlhf_pl.distributed.listener import Listener, join, make_token
from tests.strangers import KINDS, is_rejected, visit

A, B = make_token(), make_token()


@contextmanager
def welcoming(tokens: list[str], within: float = 20.0) -> Iterator[tuple[Listener, list[socket.socket]]]:
    """A listener that waits in a thread; the peers come into the list, which is full when the block has ended."""
    listener, peers = Listener("127.0.0.1", "the tests"), []
    thread = threading.Thread(target=lambda: peers.extend(listener.accept_peers(tokens, within)))
    thread.start()
    try:
        yield listener, peers
    finally:
        thread.join(within + 5)
        listener.close()
        for peer in peers:
            peer.close()


def test_peers_come_in_the_order_of_their_tokens_and_the_rest_is_theirs() -> None:
    with ExitStack() as stack, welcoming([A, B, B]) as (listener, peers):
        links = [stack.enter_context(join("127.0.0.1", listener.port, token)) for token in (B, A, B)]
        for link, more in zip(links, (b"one", b"two", b"three"), strict=True):
            link.sendall(more)
        while len(peers) < 3:
            time.sleep(0.01)
        assert [peer.recv(10) for peer in peers] == [b"two", b"one", b"three"]
        links[0].close()
        assert peers[1].recv(10) == b""


@pytest.mark.parametrize("kind", KINDS)
def test_a_stranger_delays_nobody_and_is_rejected(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "HELLO_SECONDS", 1.0)
    with welcoming([A, B]) as (listener, peers):
        stranger = visit(kind, listener.port, A, random.Random(0))
        time.sleep(0.1)
        start = time.monotonic()
        first = join("127.0.0.1", listener.port, A)
        again = visit(kind, listener.port, A, random.Random(1))
        if stranger.fileno() >= 0:  # with one deadline, however slowly it speaks
            assert is_rejected(stranger, 2.5)
        assert time.monotonic() - start < 2.5
        start = time.monotonic()
        second = join("127.0.0.1", listener.port, B)
        while len(peers) < 2:
            assert time.monotonic() - start < 1
            time.sleep(0.01)
        for connection in (stranger, again, first, second):
            connection.close()
    assert listener.rejected == 2
    said = capsys.readouterr().out
    assert said.count("127.0.0.1 was rejected") + said.count("unknown address was rejected") == 1
    assert "2 connections were rejected in all" in said


def test_a_token_lets_one_peer_in() -> None:
    with welcoming([A, B]) as (listener, _), join("127.0.0.1", listener.port, A) as real:
        time.sleep(0.1)
        with join("127.0.0.1", listener.port, A) as replayed:
            assert is_rejected(replayed, 5)
        with join("127.0.0.1", listener.port, B):
            pass
        real.sendall(b"x")
    assert listener.rejected == 1


def test_a_flood_keeps_nobody_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Silent connections by the hundred: of more than may wait the oldest go, and two lines are printed."""
    monkeypatch.setattr(module, "MAX_WAITING", 70)
    waited = []
    plain = module._PendingConnections.reject_overdue
    monkeypatch.setattr(
        module._PendingConnections, "reject_overdue", lambda p: waited.append(len(p.waiting)) or plain(p)
    )
    with ExitStack() as stack, welcoming([A]) as (listener, peers):
        for _ in range(300):
            stack.enter_context(visit("silent", listener.port, A, random.Random(0)))
        start = time.monotonic()
        with join("127.0.0.1", listener.port, A):
            while not peers:
                assert time.monotonic() - start < 2
                time.sleep(0.01)
    assert max(waited) <= 70
    assert listener.rejected == 300
    said = capsys.readouterr().out
    assert said.count("warning") == 2
    assert "300 connections were rejected in all" in said


def test_a_process_that_may_open_no_more_files_lets_the_peer_in(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, refusals = socket.socket.accept, [OSError(24, "Too many open files")] * 2

    def accept(listener: socket.socket) -> tuple[socket.socket, object]:
        if refusals:
            raise refusals.pop()
        return plain(listener)

    with welcoming([A]) as (listener, peers), visit("silent", listener.port, A, random.Random(0)):
        time.sleep(0.1)
        monkeypatch.setattr(socket.socket, "accept", accept)
        with join("127.0.0.1", listener.port, A):
            pass
    assert not refusals
    assert listener.rejected == 1
    assert len(peers) == 1


def test_it_listens_at_the_address_that_is_asked_for_alone() -> None:
    listener = Listener("127.0.0.1", "the tests")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", listener.port), timeout=5)
    socket.create_connection(("127.0.0.1", listener.port), timeout=5).close()
    listener.close()
    for address in ("192.0.2.1", "no-such-host.invalid", "127.0.0.9:1"):  # the first is nobody's (RFC 5737)
        with pytest.raises(OSError):  # noqa: PT011 - the system's own words
            Listener(address, "the tests")


def test_it_listens_at_addresses_of_ipv6() -> None:
    try:
        listener = Listener("::1", "the tests")
    except OSError:
        pytest.skip("no IPv6 here")
    with socket.create_connection(("::1", listener.port), timeout=5):
        listener.close()


def test_who_does_not_come_is_missed_in_time_and_the_others_are_released() -> None:
    listener = Listener("127.0.0.1", "the tests")
    with join("127.0.0.1", listener.port, A) as link:
        start = time.monotonic()
        with pytest.raises(TimeoutError, match=r"1 of 2 did not connect in 0\.5 s"):
            listener.accept_peers([A, B], within=0.5)
        assert time.monotonic() - start < 2
        assert is_rejected(link, 2)
    listener.close()


def test_waiting_ends_with_what_the_check_raises() -> None:
    def check() -> None:
        raise InterruptedError("they cannot come")

    listener = Listener("127.0.0.1", "the tests")
    with pytest.raises(InterruptedError):
        listener.accept_peers([A], 20, check)
    listener.close()


@pytest.mark.parametrize("token", ["", "GET / HTTP/1.1\r\n\r\n", "A" * 32, "0" * 33])
def test_what_is_not_a_token_is_sent_nowhere(token: str) -> None:
    """A server can be told any address: it sends hexadecimal digits there, not commands."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        with pytest.raises(ValueError, match="32 hexadecimal digits"):
            join("127.0.0.1", server.getsockname()[1], token)
        with pytest.raises(TimeoutError):
            server.accept()
