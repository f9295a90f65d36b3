"""A listener accepts a run's peers; unknown clients are rejected and delay nobody."""

import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from rlhf_pl.distributed import listener as module
from rlhf_pl.distributed.listener import Listener, join, make_token
from tests.unknown_clients import KINDS, is_rejected, visit

A, B = make_token(), make_token()


@contextmanager
def welcoming(tokens: list[str], within: float = 20.0) -> Iterator[tuple[Listener, list[socket.socket]]]:
    """A listener that accepts peers in a thread. At the end of the block all peers are in the list."""
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


def test_peers_are_in_the_order_of_their_tokens() -> None:
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
def test_an_unknown_client_delays_nobody_and_is_rejected(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "HELLO_SECONDS", 1.0)
    with welcoming([A, B]) as (listener, peers):
        client = visit(kind, listener.port, A, random.Random(0))
        time.sleep(0.1)
        start = time.monotonic()
        first = join("127.0.0.1", listener.port, A)
        again = visit(kind, listener.port, A, random.Random(1))
        if client.fileno() >= 0:  # the deadline does not depend on how slowly it sends
            assert is_rejected(client, 2.5)
        assert time.monotonic() - start < 2.5
        start = time.monotonic()
        second = join("127.0.0.1", listener.port, B)
        while len(peers) < 2:
            assert time.monotonic() - start < 1
            time.sleep(0.01)
        for connection in (client, again, first, second):
            connection.close()
    assert listener.rejected == 2
    output = capsys.readouterr().out
    assert output.count("127.0.0.1 was rejected") + output.count("unknown address was rejected") == 1
    assert "2 connections were rejected in all" in output


def test_a_token_lets_one_peer_in() -> None:
    with welcoming([A, B]) as (listener, _), join("127.0.0.1", listener.port, A) as real:
        time.sleep(0.1)
        with join("127.0.0.1", listener.port, A) as replayed:
            assert is_rejected(replayed, 5)
        with join("127.0.0.1", listener.port, B):
            pass
        real.sendall(b"x")
    assert listener.rejected == 1


def test_a_flood_excludes_no_peer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Hundreds of silent connections: the oldest ones beyond the limit are closed, and two lines are printed."""
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
    output = capsys.readouterr().out
    assert output.count("warning") == 2
    assert "300 connections were rejected in all" in output


def test_a_peer_is_accepted_if_the_process_reaches_its_limit_of_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_it_listens_only_at_the_given_address() -> None:
    listener = Listener("127.0.0.1", "the tests")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", listener.port), timeout=5)
    socket.create_connection(("127.0.0.1", listener.port), timeout=5).close()
    listener.close()
    for address in ("192.0.2.1", "no-such-host.invalid", "127.0.0.9:1"):  # the first is reserved (RFC 5737)
        with pytest.raises(OSError):  # noqa: PT011 - the system's own words
            Listener(address, "the tests")


def test_it_listens_at_ipv6_addresses() -> None:
    try:
        listener = Listener("::1", "the tests")
    except OSError:
        pytest.skip("no IPv6 here")
    with socket.create_connection(("::1", listener.port), timeout=5):
        listener.close()


def test_a_missing_peer_is_an_error_in_time_and_the_others_are_closed() -> None:
    listener = Listener("127.0.0.1", "the tests")
    with join("127.0.0.1", listener.port, A) as link:
        start = time.monotonic()
        with pytest.raises(TimeoutError, match=r"1 of 2 did not connect in 0\.5 s"):
            listener.accept_peers([A, B], within=0.5)
        assert time.monotonic() - start < 2
        assert is_rejected(link, 2)
    listener.close()


def test_an_exception_of_the_check_ends_the_wait() -> None:
    def check() -> None:
        raise InterruptedError("the peers have ended")

    listener = Listener("127.0.0.1", "the tests")
    with pytest.raises(InterruptedError):
        listener.accept_peers([A], 20, check)
    listener.close()


@pytest.mark.parametrize("token", ["", "GET / HTTP/1.1\r\n\r\n", "A" * 32, "0" * 33])
def test_only_tokens_are_sent(token: str) -> None:
    """A server may get any address to connect to: it sends only hexadecimal digits there, no commands."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        with pytest.raises(ValueError, match="32 hexadecimal digits"):
            join("127.0.0.1", server.getsockname()[1], token)
        with pytest.raises(TimeoutError):
            server.accept()
