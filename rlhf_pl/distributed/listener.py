"""A port for peers that know a token: strangers are turned away, and nobody waits for them."""

import contextlib
import re
import secrets
import selectors
import socket
import time
from collections.abc import Callable, Sequence

from rlhf_pl.utils.console import warn

HELLO_SECONDS = 10.0  # that a connection has for its token, all in all
MAX_WAITING = 256  # connections that have not sent their token; of more, the oldest is turned away
CONNECT_SECONDS = 30.0  # that a peer tries to connect
_TOKEN_LENGTH = 32  # hexadecimal digits
_BACKLOG = 1024  # connections that the system keeps until they are accepted
_BATCH = 64  # accepted at a time, far fewer than may wait: each is read several times before it can be the oldest
_TICK = 0.2  # seconds between looks at deadlines
_KEEPALIVE = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4))  # a host that is gone: 30 seconds


def make_token() -> str:
    """What a peer has to know; it is told on another way than by the port."""
    return secrets.token_hex(_TOKEN_LENGTH // 2)


class Listener:
    """Listens at one address until every peer has come. A peer's first bytes are its token.

    Connections are read side by side, each against one deadline of its own from the moment that it is accepted, so that
    silent and slow ones delay nobody. The first that is turned away is reported, all are counted.

    Args:
        address: Of this host, as a name or a number.
        purpose: Whose connections are awaited, for messages.

    Raises:
        OSError: The address is not one of this host, or does not exist.
    """

    def __init__(self, address: str, purpose: str) -> None:
        family, _, _, _, where = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
        self._socket = socket.create_server(where, family=family, backlog=_BACKLOG)
        self._socket.setblocking(False)
        self._purpose = purpose
        self.turned_away = 0

    @property
    def port(self) -> int:
        return self._socket.getsockname()[1]

    def welcome(
        self, tokens: Sequence[str], within: float, check: Callable[[], None] = lambda: None
    ) -> list[socket.socket]:
        """Wait for a peer with every token. Then nobody else is let in.

        Args:
            tokens: Of the peers; one that stands there twice lets two in.
            within: Seconds until all must have come.
            check: Called several times a second; may raise to end the waiting.

        Returns:
            Their connections, in the order of the tokens.

        Raises:
            TimeoutError: Not all came.
        """
        hall, end = _Hall(tokens), time.monotonic() + within
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(self._socket, selectors.EVENT_READ)
                hall.selector = selector
                while hall.missing:
                    check()
                    if time.monotonic() > end:
                        raise TimeoutError(f"{len(hall.missing)} of {len(tokens)} did not connect in {within:g} s")
                    ready = [key.fileobj for key, _ in selector.select(_TICK)]
                    self._report(hall.hear([c for c in ready if c in hall.waiting]))
                    if self._socket in ready:
                        self._report(hall.take(self._socket))
                    self._report(hall.overdue())
        except BaseException:
            for peer in hall.peers.values():
                peer.close()
            raise
        finally:
            self._report([_end(connection) for connection in hall.waiting])
            if self.turned_away > 1:
                self._warn(f"{self.turned_away} connections were turned away in all")
        return [hall.peers[number] for number in range(len(tokens))]

    def close(self) -> None:
        self._socket.close()

    def _report(self, strangers: Sequence[str]) -> None:
        if strangers and not self.turned_away:
            self._warn(
                f"a connection from {strangers[0]} was turned away, which did not give this run's token; the run goes "
                "on, and further ones are counted"
            )
        self.turned_away += len(strangers)

    def _warn(self, text: str) -> None:
        warn(f"the port for {self._purpose}: {text}.")


class _Hall:
    """Connections that have not sent their token, and the peers that have. Methods give the addresses turned away."""

    selector: selectors.BaseSelector

    def __init__(self, tokens: Sequence[str]) -> None:
        self.missing = {number: token.encode() for number, token in enumerate(tokens)}
        self.peers: dict[int, socket.socket] = {}
        self.waiting: dict[socket.socket, tuple[float, bytes]] = {}  # deadline, what came; the oldest first

    def take(self, listener: socket.socket) -> list[str]:
        """Accept who waits at the port."""
        for _ in range(_BATCH):
            try:
                connection, _ = listener.accept()
            except BlockingIOError:
                break
            except OSError:  # it has gone again, or this process may open no more files
                time.sleep(0.01)
                return [self._turn_away(next(iter(self.waiting)))] if self.waiting else []
            connection.setblocking(False)
            self.waiting[connection] = (time.monotonic() + HELLO_SECONDS, b"")
            self.selector.register(connection, selectors.EVENT_READ)
        too_many = max(0, len(self.waiting) - MAX_WAITING)
        return [self._turn_away(connection) for connection in list(self.waiting)[:too_many]]

    def hear(self, connections: Sequence[socket.socket]) -> list[str]:
        """Read what they have sent, and let in who has sent a token that is missing."""
        away = []
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
                away.append(self._turn_away(connection))
            else:
                del self.missing[number], self.waiting[connection]
                self.selector.unregister(connection)
                connection.setblocking(True)
                keep_alive(connection)
                self.peers[number] = connection
        return away

    def overdue(self) -> list[str]:
        now = time.monotonic()
        return [self._turn_away(connection) for connection, (end, _) in list(self.waiting.items()) if end < now]

    def _number(self, text: bytes) -> int | None:
        """Of the peer that has this token; all are compared, so that the time tells nothing."""
        fits = [number for number, token in self.missing.items() if secrets.compare_digest(text, token)]
        return fits[0] if fits else None

    def _turn_away(self, connection: socket.socket) -> str:
        del self.waiting[connection]
        self.selector.unregister(connection)
        return _end(connection)


def _end(connection: socket.socket) -> str:
    """Close it; gives its address."""
    with contextlib.suppress(OSError), connection:
        return str(connection.getpeername()[0])
    return "an address that has gone"


def join(address: str, port: int, token: str) -> socket.socket:
    """Connect to a Listener as a peer.

    Raises:
        OSError: It can't be reached.
        ValueError: The token is none, and goes nowhere.
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
    """Have the system notice that the other host is gone."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE:
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
