"""Unknown clients of a port, by kind. They stay connected until the port closes the connection."""

import contextlib
import json
import random
import socket
import struct
import threading
import time
from collections.abc import Callable

Behaviour = Callable[[socket.socket, str, random.Random], None]


def _sends(make: Callable[[str, random.Random], bytes]) -> Behaviour:
    return lambda connection, token, rng: connection.sendall(make(token, rng))


def _object(**fields: object) -> bytes:
    return (json.dumps(fields) + "\n").encode()


def _trickle(connection: socket.socket, token: str, rng: random.Random) -> None:
    def send_slowly() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection.sendall(b"0")
                time.sleep(0.1)

    threading.Thread(target=send_slowly, daemon=True).start()


def _half_closed(connection: socket.socket, token: str, rng: random.Random) -> None:
    connection.sendall(b"abc")
    connection.shutdown(socket.SHUT_WR)


def _scan(connection: socket.socket, token: str, rng: random.Random) -> None:
    """Close the connection with a reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


KINDS: dict[str, Behaviour] = {
    "silent": lambda connection, token, rng: None,
    "trickle": _trickle,
    "half closed": _half_closed,
    "port scan": _scan,
    "closed at once": lambda connection, token, rng: connection.close(),
    "short": _sends(lambda token, rng: b"hello"),
    "token with a wrong last digit": _sends(lambda token, rng: (token[:-1] + "g").encode()),
    "token without its last digit": _sends(lambda token, rng: token[:-1].encode()),
    "token after a space": _sends(lambda token, rng: b" " + token.encode()),
    "too long": _sends(lambda token, rng: b"x" * 2**16),
    "not UTF-8": _sends(lambda token, rng: b"\xff\xfe\x80\n" * 20),
    "not an object": _sends(lambda token, rng: rng.choice([b"[1]\n", b"5\n", b"null\n", b'"text"\n', b"true\n"])),
    "deeply nested": _sends(lambda token, rng: b"[" * 20000 + b"\n"),
    "a rank's hello without the token": _sends(lambda token, rng: _object(token="", rank=1, host="h", pid=1)),
    "wrong types": _sends(lambda token, rng: _object(token=[1], rank=rng.choice(["1", -1, 10**9, None, 1.5]))),
    "HTTP": _sends(lambda token, rng: b"GET / HTTP/1.1\r\nHost: node\r\n\r\n"),
    "random bytes": _sends(lambda token, rng: rng.randbytes(rng.randrange(1, 200))),
}


def visit(kind: str, port: int, token: str, rng: random.Random, address: str = "127.0.0.1") -> socket.socket:
    """Connect to a port as an unknown client of a kind; the caller closes the connection."""
    connection = socket.create_connection((address, port), timeout=10)
    with contextlib.suppress(OSError):  # rejected before all was sent
        KINDS[kind](connection, token, rng)
    return connection


def is_rejected(connection: socket.socket, within: float) -> bool:
    """Whether the other end closes the connection in time."""
    end = time.monotonic() + within
    try:
        while (seconds := end - time.monotonic()) > 0:
            connection.settimeout(seconds)
            if not connection.recv(64):
                return True
    except TimeoutError:
        return False
    except OSError:
        return True
    return False
