"""Ranks hear of each other's end: one that dies or fails ends the others at once, with a message."""

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from rlhf_pl.console import console
from rlhf_pl.terminal import print_error

GRACE = 3.0  # seconds that a rank has to report the same failure in its own words
PATIENCE = 20.0  # seconds that the others wait for rank 0 to print why, and to end
_KEEPALIVE = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4))  # a host that is gone: 30 seconds


class RankWatch:
    """A connection from every rank to rank 0, by a thread beside the training.

    A collective call whose partner has died may hang, and a process that generates does not look at its partners. So
    every rank keeps a TCP connection to rank 0, which tells the others when one breaks without a goodbye. A rank that
    hears of it prints why and ends its process; what the run has written is whole at any moment.

    Args:
        rank: This process.
        size: Number of processes.
        share: Gives every rank the value of rank 0.
        address: Where the other ranks reach rank 0.
        local: Whether all ranks are on one host.
    """

    def __init__(self, rank: int, size: int, share: Callable[[Any], Any], address: str, local: bool) -> None:
        self.rank, self.size = rank, size
        self.places: dict[int, str] = {}  # where each rank is, as it last said; on rank 0
        self._lock = threading.Lock()
        self._closing = False
        self._done: set[int] = set()
        self._links: dict[int, socket.socket] = {}
        self._names = {0: "rank 0"}
        listener = None
        if rank == 0:
            listener = socket.create_server(("127.0.0.1" if local else "", 0), backlog=size)
        token, port = share((secrets.token_hex(16), listener.getsockname()[1] if listener else 0))
        if listener is not None:
            self._accept(listener, token)
            listener.close()
        else:
            link = socket.create_connection(("127.0.0.1" if local else address, port), timeout=60)
            me = {"token": token, "rank": rank, "host": socket.gethostname(), "pid": os.getpid()}
            _send(link, me)
            self._links[0] = link
        for other, link in self._links.items():
            link.settimeout(None)
            _keep_alive(link)
            threading.Thread(target=self._listen, args=(other, link), daemon=True, name=f"watch-{other}").start()

    def _accept(self, listener: socket.socket, token: str) -> None:
        """Take the connections of all other ranks; strangers are turned away."""
        listener.settimeout(60)
        while len(self._links) < self.size - 1:
            link, _ = listener.accept()
            link.settimeout(10)
            try:
                hello = json.loads(_read_line(link))
            except (OSError, ValueError):
                hello = {}
            if hello.get("token") != token:
                link.close()
                continue
            other = int(hello["rank"])
            self._links[other] = link
            self._names[other] = f"rank {other} (process {hello['pid']} on {hello['host']})"

    def at(self, place: str) -> None:
        """Tell rank 0 what this rank is doing."""
        self.places[self.rank] = place
        if self.rank > 0:
            self._tell({"at": place})

    def fail(self, message: str, code: int) -> None:
        """Tell the others why this rank ends, and give rank 0 the time to print it."""
        self._closing = True
        self._tell({"failed": message, "code": code})
        if self.rank > 0:
            end = time.monotonic() + PATIENCE
            while time.monotonic() < end and 0 not in self._done:
                time.sleep(0.05)

    def close(self) -> None:
        """This rank has come to its end as it should."""
        self._closing = True
        self._tell({"bye": True})

    def _tell(self, message: dict[str, Any]) -> None:
        with self._lock:
            for link in self._links.values():
                try:
                    _send(link, message)
                except OSError:
                    continue  # its end is noticed by whoever listens to it

    def _listen(self, other: int, link: socket.socket) -> None:
        reader = link.makefile("r", encoding="utf-8")
        while True:
            try:
                line = reader.readline()
            except (OSError, ValueError):
                line = ""
            if not line:
                break
            message = json.loads(line)
            if "at" in message:
                self.places[other] = message["at"]
            elif "bye" in message:
                self._done.add(other)
            elif "failed" in message:
                self._done.add(other)
                if self.rank > 0:
                    # Lightning's launcher kills rank 0 soon after another process has failed: let it end first
                    link.settimeout(PATIENCE)
                    with contextlib.suppress(OSError):
                        while reader.readline():
                            pass
                reason = f"rank {other}: {message['failed']}" if self.rank == 0 else message["failed"]
                self._end(reason, message["code"], GRACE if self.rank == 0 else 0.0)
        if other not in self._done and not self._closing:
            place = self.places.get(other)
            doing = f" in the phase {place!r}" if place else ""
            self._end(f"{self._names[other]} has died{doing}. The same command goes on where the run was.", 1, 0.0)
        self._done.add(other)

    def _end(self, message: str, code: int, grace: float) -> None:
        """End this process, unless it comes to its own end within the grace; rank 0, or else rank 1, says why."""
        end = time.monotonic() + grace
        while time.monotonic() < end and not self._closing:
            time.sleep(0.05)
        if self._closing:
            return
        if self.rank == 0:
            self._tell({"failed": message, "code": code})
        if self.rank == 0 or (self.rank == 1 and 0 not in self._done):
            console.show_cursor()
            sys.stdout.flush()
            print_error(message)
        os._exit(code)


def _send(link: socket.socket, message: dict[str, Any]) -> None:
    link.sendall((json.dumps(message) + "\n").encode())


def _read_line(link: socket.socket) -> str:
    text = b""
    while not text.endswith(b"\n"):
        part = link.recv(1)
        if not part:
            break
        text += part
    return text.decode()


def _keep_alive(link: socket.socket) -> None:
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE:
        if hasattr(socket, name):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
