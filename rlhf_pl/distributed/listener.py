"""A port for peers that know a token. Other connections are rejected, and delay nobody."""

import contextlib
import re
import secrets
import selectors
import socket
import time
from collections.abc import Callable, Sequence

from rlhf_pl.utils.console import warn

HELLO_SECONDS = 10.0  # in which a connection must send its token
MAX_WAITING = 256  # connections without a token yet; above that the oldest is rejected
CONNECT_SECONDS = 30.0  # timeout of a peer's attempt to connect
_TOKEN_LENGTH = 32  # hexadecimal digits
_BACKLOG = 1024  # connections that the system queues
_BATCH = 64  # accepted at a time; far below MAX_WAITING, so that each is read several times before it is the oldest
_TICK = 0.2  # seconds between checks of the deadlines
_KEEPALIVE = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4))  # a lost host is noticed after 30 seconds


def make_token() -> str:
    """The secret of a peer, which reaches it by another way than the port."""
    return secrets.token_hex(_TOKEN_LENGTH // 2)


class Listener:
    """Listens at one address until every peer has connected. A peer's first bytes are its token.

    Connections are read concurrently, each with its own deadline from the moment it is accepted, so silent and slow
    ones delay nobody. The first rejected connection is reported, all are counted.

    Args:
        address: Name or number of this host's address.
        purpose: Who is expected to connect, for messages.

    Raises:
        OSError: The address does not exist, or is not this host's.
    """

    def __init__(self, address: str, purpose: str) -> None:
        family, _, _, _, where = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
        self._socket = socket.create_server(where, family=family, backlog=_BACKLOG)
        self._socket.setblocking(False)
        self._purpose = purpose
        self.rejected = 0

    @property
    def port(self) -> int:
        return self._socket.getsockname()[1]

    def accept_peers(
        self, tokens: Sequence[str], within: float, check: Callable[[], None] = lambda: None
    ) -> list[socket.socket]:
        """Wait for one peer per token, then accept nobody else.

        Args:
            tokens: One per peer; a token listed twice accepts two peers.
            within: Seconds in which all must connect.
            check: Called several times a second; may raise to stop waiting.

        Returns:
            The peers' connections, in the order of `tokens`.

        Raises:
            TimeoutError: A peer did not connect in time.
        """
        pending, end = _PendingConnections(tokens), time.monotonic() + within
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(self._socket, selectors.EVENT_READ)
                pending.selector = selector
                while pending.missing:
                    check()
                    if time.monotonic() > end:
                        raise TimeoutError(f"{len(pending.missing)} of {len(tokens)} did not connect in {within:g} s")
                    ready = [key.fileobj for key, _ in selector.select(_TICK)]
                    self._report(pending.read([c for c in ready if c in pending.waiting]))
                    if self._socket in ready:
                        self._report(pending.accept(self._socket))
                    self._report(pending.reject_overdue())
        except BaseException:
            for peer in pending.peers.values():
                peer.close()
            raise
        finally:
            self._report([_close(connection) for connection in pending.waiting])
            if self.rejected > 1:
                self._warn(f"{self.rejected} connections were rejected in all")
        return [pending.peers[number] for number in range(len(tokens))]

    def close(self) -> None:
        self._socket.close()

    def _report(self, addresses: Sequence[str]) -> None:
        if addresses and not self.rejected:
            self._warn(
                f"a connection from {addresses[0]} was rejected, because it did not send this run's token. The run "
                "goes on; further ones are counted"
            )
        self.rejected += len(addresses)

    def _warn(self, text: str) -> None:
        warn(f"the port for {self._purpose}: {text}.")


class _PendingConnections:
    """Connections without a token yet, and accepted peers. Methods return the addresses they reject."""

    selector: selectors.BaseSelector

    def __init__(self, tokens: Sequence[str]) -> None:
        self.missing = {number: token.encode() for number, token in enumerate(tokens)}
        self.peers: dict[int, socket.socket] = {}
        self.waiting: dict[socket.socket, tuple[float, bytes]] = {}  # deadline and bytes so far; the oldest first

    def accept(self, listener: socket.socket) -> list[str]:
        """Accept queued connections."""
        for _ in range(_BATCH):
            try:
                connection, _ = listener.accept()
            except BlockingIOError:
                break
            except OSError:  # it is gone again, or this process is out of file descriptors
                time.sleep(0.01)
                return [self._reject(next(iter(self.waiting)))] if self.waiting else []
            connection.setblocking(False)
            self.waiting[connection] = (time.monotonic() + HELLO_SECONDS, b"")
            self.selector.register(connection, selectors.EVENT_READ)
        too_many = max(0, len(self.waiting) - MAX_WAITING)
        return [self._reject(connection) for connection in list(self.waiting)[:too_many]]

    def read(self, connections: Sequence[socket.socket]) -> list[str]:
        """Read what `connections` have sent, and accept those with a missing peer's token."""
        rejected = []
        for connection in connections:
            end, text = self.waiting[connection]
            try:
                part = connection.recv(_TOKEN_LENGTH - len(text))
            except BlockingIOError:
                continue
            except OSError:
                part = b""
            text += part
            if part and len(text) < _TOKEN_LENGTH:
                self.waiting[connection] = (end, text)
            elif (number := self._number(text)) is None:
                rejected.append(self._reject(connection))
            else:
                del self.missing[number], self.waiting[connection]
                self.selector.unregister(connection)
                connection.setblocking(True)
                keep_alive(connection)
                self.peers[number] = connection
        return rejected

    def reject_overdue(self) -> list[str]:
        """Reject connections past their deadline."""
        now = time.monotonic()
        return [self._reject(connection) for connection, (end, _) in list(self.waiting.items()) if end < now]

    def _number(self, text: bytes) -> int | None:
        """Number of the peer with this token. All tokens are compared, in constant time."""
        fits = [number for number, token in self.missing.items() if secrets.compare_digest(text, token)]
        return fits[0] if fits else None

    def _reject(self, connection: socket.socket) -> str:
        del self.waiting[connection]
        self.selector.unregister(connection)
        return _close(connection)


def _close(connection: socket.socket) -> str:
    """Close a connection and return its address."""
    with contextlib.suppress(OSError), connection:
        return str(connection.getpeername()[0])
    return "an unknown address"


def join(address: str, port: int, token: str) -> socket.socket:
    """Connect to a Listener as a peer.

    Raises:
        OSError: The listener can't be reached.
        ValueError: The token is malformed; nothing is sent.
    """
    if not re.fullmatch(rf"[0-9a-f]{{{_TOKEN_LENGTH}}}", token):
        raise ValueError(f"The token must have {_TOKEN_LENGTH} hexadecimal digits.")
    connection = socket.create_connection((address, port), timeout=CONNECT_SECONDS)
    try:
        connection.sendall(token.encode())
        keep_alive(connection)
    except BaseException:
        connection.close()
        raise
    connection.settimeout(None)
    return connection


def keep_alive(connection: socket.socket) -> None:
    """Let the system notice a lost host (TCP keepalive)."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE:
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
