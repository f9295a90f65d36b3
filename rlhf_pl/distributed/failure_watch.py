"""Ranks hear of each other's end: one that dies or fails ends the others at once, with a message."""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from rlhf_pl.distributed.listener import Listener, join, make_token
from rlhf_pl.utils.console import console, warn
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.terminal import print_error

GIVE_WAY = 0.5  # seconds that a failure waits for word of a death that may have caused it
GRACE = 3.0  # seconds that a rank has to report the same failure in its own words
PATIENCE = 20.0  # seconds that the others wait for rank 0 to print why, and to end
JOIN_SECONDS = 60.0  # until all ranks must have connected to rank 0
MAX_REASON = 8000  # characters of a failure that the others are told
MAX_LINE = 2**17  # bytes of a message; a failure's characters take up to twelve each
_KINDS = {"is": str, "at": str, "bye": bool, "failed": str, "code": int}  # what a message may say


_REMEDY = "Give the address of the first node that the others reach (MASTER_ADDR), and open its ports to them."


class RankWatch:
    """A connection from every rank to rank 0, read by a thread beside the training.

    A collective call whose partner has died may hang, and a process that generates does not look at its partners. So
    every rank keeps a TCP connection to rank 0, which tells the others when one breaks without a goodbye. A rank that
    hears of it prints why and ends its process; what the run has written is whole at any moment.

    Args:
        rank: This process.
        size: Number of processes.
        share: Gives every rank the value of rank 0.
        address: Of rank 0's host, where the other ranks reach it.
        local: Whether all ranks are on one host: rank 0 then listens on the loopback address.

    Raises:
        InputError: Rank 0 can't listen there, or the ranks can't reach it.
    """

    def __init__(self, rank: int, size: int, share: Callable[[Any], Any], address: str, local: bool) -> None:
        self.rank, self.size = rank, size
        self.places: dict[int, str] = {}  # where each rank is, as it last said; on rank 0
        self._lock = threading.Lock()
        self._closing = False
        self._done: set[int] = set()
        self._names = {other: f"rank {other}" for other in range(size)}
        address = "127.0.0.1" if local else address
        self._links = self._welcome(share, address) if rank == 0 else {0: self._join(share, address)}
        for other, link in self._links.items():
            threading.Thread(target=self._listen, args=(other, link), daemon=True, name=f"watch-{other}").start()
        self._tell({"is": f"rank {rank} (process {os.getpid()} on {socket.gethostname()})"})

    def _welcome(self, share: Callable[[Any], Any], address: str) -> dict[int, socket.socket]:
        """Have every other rank connect with a token of its own, which says who it is; strangers are turned away."""
        tokens = [make_token() for _ in range(self.size)]
        try:
            listener = Listener(address, "the ranks")
        except OSError as error:
            refused = f"Rank 0 can't listen at {address}: {error.strerror or error}. " + _REMEDY
            share((tokens, 0, refused))
            raise InputError(refused) from error
        try:
            share((tokens, listener.port, ""))
            links = listener.welcome(tokens[1:], JOIN_SECONDS)
        except TimeoutError as error:
            raise InputError(f"Rank 0 listens at {address}, port {listener.port}, but {error}. " + _REMEDY) from error
        finally:
            listener.close()
        return dict(enumerate(links, 1))

    def _join(self, share: Callable[[Any], Any], address: str) -> socket.socket:
        tokens, port, refused = share(None)
        try:
            if not refused:
                return join(address, port, tokens[self.rank])
        except OSError as error:
            reason = error.strerror or error
            refused = f"Rank {self.rank} can't reach rank 0 at {address}, port {port}: {reason}. " + _REMEDY
        raise InputError(refused)

    def at(self, place: str) -> None:
        """Tell rank 0 what this rank is doing."""
        self.places[self.rank] = place
        if self.rank > 0:
            self._tell({"at": place})

    def fail(self, message: str, code: int) -> None:
        """Tell the others why this rank ends, and give rank 0 the time to print it."""
        time.sleep(GIVE_WAY)  # where another rank has died, the thread that hears of it ends this process here
        self._closing = True
        self._tell({"failed": message[:MAX_REASON], "code": code})
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
        heard_nonsense = False
        for line in _lines(link.makefile("rb")):
            message = _message(line)
            if message is None:
                if not heard_nonsense:
                    heard_nonsense = True
                    warn(f"{self._names[other]} has sent what is not a message of this run; such lines are ignored.")
            elif "is" in message:
                self._names[other] = message["is"]
            elif "at" in message:
                self.places[other] = message["at"]
            elif "bye" in message:
                self._done.add(other)
            elif "failed" in message:
                self._done.add(other)
                if self.rank > 0:
                    # Lightning's launcher kills rank 0 soon after another process has failed: let it end first
                    _wait_for_end(link)
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
            self._tell({"failed": message[:MAX_REASON], "code": code})
        if self.rank == 0 or (self.rank == 1 and 0 not in self._done):
            console.show_cursor()
            sys.stdout.flush()
            print_error(message)
        os._exit(code)


def _send(link: socket.socket, message: dict[str, Any]) -> None:
    link.sendall((json.dumps(message) + "\n").encode())


def _lines(reader: BinaryIO) -> Iterator[bytes]:
    """Whole lines until the connection ends; an empty one for each that is too long."""
    try:
        while line := reader.readline(MAX_LINE):
            whole = line.endswith(b"\n")
            while line and not line.endswith(b"\n"):
                line = reader.readline(MAX_LINE)
            yield line if whole else b""
    except OSError:
        return


def _message(line: bytes) -> dict[str, Any] | None:
    """What a rank says; None for anything else."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(message, dict) or any(type(value) is not _KINDS.get(key) for key, value in message.items()):
        return None
    if "failed" in message and not 0 < message.get("code", 0) < 256:
        return None
    return message


def _wait_for_end(link: socket.socket) -> None:
    """Until the other end has closed, but not for longer than the patience."""
    end = time.monotonic() + PATIENCE
    try:
        while (seconds := end - time.monotonic()) > 0:
            link.settimeout(seconds)
            if not link.recv(4096):
                return
    except OSError:
        return
