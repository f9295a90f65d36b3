"""Failure watch: when one rank dies or fails, all others end at once, with a message."""

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

GIVE_WAY = 0.5  # seconds that a failing rank waits: the death of another rank may be the cause
GRACE = 3.0  # seconds in which a rank may report the same failure itself
PATIENCE = 20.0  # seconds that the others wait for rank 0 to print the reason and to end
JOIN_SECONDS = 60.0  # until all ranks must have connected to rank 0
MAX_REASON = 8000  # characters of a failure that are sent to the others
MAX_LINE = 2**17  # bytes of a message; a failure's characters take up to twelve each
_KINDS = {"is": str, "at": str, "bye": bool, "failed": str, "code": int}  # keys and types of a message


_REMEDY = "Give the address of the first node that the others reach (MASTER_ADDR), and open its ports to them."


class RankWatch:
    """A connection from every rank to rank 0, read by a thread beside the training.

    A collective call may hang when a peer has died, and a process that samples makes no collective calls. So every rank
    keeps a TCP connection to rank 0, which notifies the others when one breaks without a goodbye. A notified rank
    prints the reason and ends its process. The files of the run are complete at any moment.

    Args:
        rank: This process.
        size: Number of processes.
        broadcast: Returns rank 0's value on every rank.
        address: Address of rank 0's host, as the other ranks reach it.
        local: Whether all ranks are on one host: rank 0 then listens on the loopback address.

    Raises:
        InputError: Rank 0 can't listen there, or the ranks can't reach it.
    """

    def __init__(self, rank: int, size: int, broadcast: Callable[[Any], Any], address: str, local: bool) -> None:
        self.rank, self.size = rank, size
        self.places: dict[int, str] = {}  # rank -> its last reported phase; on rank 0
        self._lock = threading.Lock()
        self._closing = False
        self._done: set[int] = set()
        self._names = {other: f"rank {other}" for other in range(size)}
        address = "127.0.0.1" if local else address
        self._links = self._accept_ranks(broadcast, address) if rank == 0 else {0: self._join(broadcast, address)}
        for other, link in self._links.items():
            threading.Thread(target=self._listen, args=(other, link), daemon=True, name=f"watch-{other}").start()
        self._send_to_all({"is": f"rank {rank} (process {os.getpid()} on {socket.gethostname()})"})

    def _accept_ranks(self, broadcast: Callable[[Any], Any], address: str) -> dict[int, socket.socket]:
        """Accept a connection from every other rank. Each has its own token, which identifies it.

        Others are rejected.
        """
        tokens = [make_token() for _ in range(self.size)]
        try:
            listener = Listener(address, "the ranks")
        except OSError as error:
            refused = f"Rank 0 can't listen at {address}: {error.strerror or error}. " + _REMEDY
            broadcast((tokens, 0, refused))
            raise InputError(refused) from error
        try:
            broadcast((tokens, listener.port, ""))
            links = listener.accept_peers(tokens[1:], JOIN_SECONDS)
        except TimeoutError as error:
            raise InputError(f"Rank 0 listens at {address}, port {listener.port}, but {error}. " + _REMEDY) from error
        finally:
            listener.close()
        return dict(enumerate(links, 1))

    def _join(self, broadcast: Callable[[Any], Any], address: str) -> socket.socket:
        tokens, port, refused = broadcast(None)
        try:
            if not refused:
                return join(address, port, tokens[self.rank])
        except OSError as error:
            reason = error.strerror or error
            refused = f"Rank {self.rank} can't reach rank 0 at {address}, port {port}: {reason}. " + _REMEDY
        raise InputError(refused)

    def report_phase(self, place: str) -> None:
        """Report this rank's phase to rank 0."""
        self.places[self.rank] = place
        if self.rank > 0:
            self._send_to_all({"at": place})

    def fail(self, message: str, code: int) -> None:
        """Report why this rank ends, and give rank 0 the time to print it."""
        time.sleep(GIVE_WAY)  # if another rank has died, the listening thread ends this process here
        self._closing = True
        self._send_to_all({"failed": message[:MAX_REASON], "code": code})
        if self.rank > 0:
            end = time.monotonic() + PATIENCE
            while time.monotonic() < end and 0 not in self._done:
                time.sleep(0.05)

    def close(self) -> None:
        """Mark this rank as finished without failure."""
        self._closing = True
        self._send_to_all({"bye": True})

    def _send_to_all(self, message: dict[str, Any]) -> None:
        with self._lock:
            for link in self._links.values():
                try:
                    _send(link, message)
                except OSError:
                    continue  # the thread that listens to it notices the end

    def _listen(self, other: int, link: socket.socket) -> None:
        warned = False
        for line in _lines(link.makefile("rb")):
            message = _message(line)
            if message is None:
                if not warned:
                    warned = True
                    warn(f"{self._names[other]} sent a line that is not a message of this run. Such lines are ignored.")
            elif "is" in message:
                self._names[other] = message["is"]
            elif "at" in message:
                self.places[other] = message["at"]
            elif "bye" in message:
                self._done.add(other)
            elif "failed" in message:
                self._done.add(other)
                if self.rank > 0:
                    # Lightning's launcher kills rank 0 soon after another process fails: let rank 0 end first
                    _wait_for_end(link)
                reason = f"rank {other}: {message['failed']}" if self.rank == 0 else message["failed"]
                self._end(reason, message["code"], GRACE if self.rank == 0 else 0.0)
        if other not in self._done and not self._closing:
            place = self.places.get(other)
            doing = f" in the phase {place!r}" if place else ""
            self._end(f"{self._names[other]} has died{doing}. Run the same command again to resume.", 1, 0.0)
        self._done.add(other)

    def _end(self, message: str, code: int, grace: float) -> None:
        """End this process, unless it ends by itself within `grace` seconds.

        Rank 0, or else rank 1, prints the reason.
        """
        end = time.monotonic() + grace
        while time.monotonic() < end and not self._closing:
            time.sleep(0.05)
        if self._closing:
            return
        if self.rank == 0:
            self._send_to_all({"failed": message[:MAX_REASON], "code": code})
        if self.rank == 0 or (self.rank == 1 and 0 not in self._done):
            console.show_cursor()
            sys.stdout.flush()
            print_error(message)
        os._exit(code)


def _send(link: socket.socket, message: dict[str, Any]) -> None:
    link.sendall((json.dumps(message) + "\n").encode())


def _lines(reader: BinaryIO) -> Iterator[bytes]:
    """Yield complete lines until the connection ends; an empty one for each that is too long."""
    try:
        while line := reader.readline(MAX_LINE):
            whole = line.endswith(b"\n")
            while line and not line.endswith(b"\n"):
                line = reader.readline(MAX_LINE)
            yield line if whole else b""
    except OSError:
        return


def _message(line: bytes) -> dict[str, Any] | None:
    """Parse a rank's message; None if it is not one."""
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
    """Wait until the other end has closed, at most `PATIENCE` seconds."""
    end = time.monotonic() + PATIENCE
    try:
        while (seconds := end - time.monotonic()) > 0:
            link.settimeout(seconds)
            if not link.recv(4096):
                return
    except OSError:
        return
