"""Connects unknown clients to both ports of a run, its ranks' watch and listener for weights; prints a table.

    python tests/soak/unknown_clients.py [--clients 2000] [--seed 0]

Unknown clients of every kind (`tests/unknown_clients.py`) connect before and between the real peers of a port,
until the port is closed. The table has their number, and the seconds until all real peers were accepted. Then every
peer must receive exactly its own bytes.
"""

import argparse
import contextlib
import io
import random
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from rlhf_pl.distributed.failure_watch import RankWatch
from rlhf_pl.distributed.listener import join
from rlhf_pl.rollout.weight_sync.plugin import read_exactly
from rlhf_pl.rollout.weight_sync.transports import TCPPush
from tests.unknown_clients import KINDS, visit

PEERS = 4
MAX_OPEN = 100  # connections that unknown clients keep open
WEIGHT = torch.arange(100_000, dtype=torch.float32)


class Outcome(NamedTuple):
    """The result of a trial at one port."""

    clients: int  # unknown clients that connected
    seconds: float  # until the real peers were accepted, with the unknown clients before them
    is_correct: bool  # every peer received its own bytes


class UnknownClients:
    """Connect to a port in a thread until stopped; the same seed gives the same clients."""

    def __init__(self, port: int, token: str, count: int, seed: int) -> None:
        self.connected, self._rng = 0, random.Random(seed)
        self._target, self._stop = (port, token), threading.Event()
        self._open: list[Any] = []
        for _ in range(count // 2):
            self._connect_one()
        self._thread = threading.Thread(target=self._connect_more, args=(count - self.connected,))
        self._thread.start()

    def _connect_one(self) -> None:
        self._open.append(visit(self._rng.choice(list(KINDS)), *self._target, self._rng))
        self.connected += 1
        if len(self._open) > MAX_OPEN:
            self._open.pop(0).close()

    def _connect_more(self, count: int) -> None:
        with contextlib.suppress(OSError):  # all peers have connected, so the port is closed
            while count and not self._stop.is_set():
                self._connect_one()
                count -= 1

    def stop(self) -> int:
        self._stop.set()
        self._thread.join()
        for connection in self._open:
            connection.close()
        return self.connected


def try_weight_listener(count: int, seed: int) -> Outcome:
    """Try the listener for weights, with the workers of a server."""
    push = TCPPush("127.0.0.1")
    info = push.init_info(0, PEERS)

    def worker(number: int) -> bool:
        time.sleep(0.1 * number)
        buffer = bytearray(WEIGHT.nbytes)
        with join(info["address"], info["port"], info["token"]) as link:
            read_exactly(link, memoryview(buffer), time.monotonic() + 60)
        return buffer == WEIGHT.numpy().tobytes()

    with contextlib.closing(push), ThreadPoolExecutor(PEERS + 1) as pool:
        start = time.monotonic()
        connected = pool.submit(push.connect, PEERS, lambda: None)
        clients = UnknownClients(info["port"], info["token"], count, seed)
        working = [pool.submit(worker, number) for number in range(PEERS)]
        connected.result()
        seconds = time.monotonic() - start
        number = clients.stop()
        push.send([WEIGHT])
        return Outcome(number, seconds, all(work.result() for work in working))


def try_rank_watch(count: int, seed: int) -> Outcome:
    """Try the ranks' watch, with all ranks in this process."""
    shared: list[Any] = []
    clients: list[UnknownClients] = []
    ready = threading.Event()

    def broadcast(value: Any) -> Any:
        if value is not None:
            shared.append(value)
            ready.set()
        ready.wait()
        return shared[0]

    def rank(number: int) -> RankWatch:
        if number:
            ready.wait()
            if number == 1:
                clients.append(UnknownClients(shared[0][1], shared[0][0][1], count, seed))
            time.sleep(0.1 * number)
        return RankWatch(number, PEERS + 1, broadcast, "", True)

    start = time.monotonic()
    with ThreadPoolExecutor(PEERS + 1) as pool:
        watches = list(pool.map(rank, range(PEERS + 1)))
    seconds = time.monotonic() - start
    connected = clients[0].stop()
    for number, rank_watch in enumerate(watches[1:], 1):
        rank_watch.report_phase(f"place {number}")
    end = time.monotonic() + 10
    expected = {number: f"place {number}" for number in range(1, PEERS + 1)}
    while watches[0].places != expected and time.monotonic() < end:
        time.sleep(0.01)
    is_correct = watches[0].places == expected
    for rank_watch in reversed(watches):
        rank_watch.close()
    return Outcome(connected, seconds, is_correct)


PORTS: dict[str, Callable[[int, int], Outcome]] = {
    "listener for weights": try_weight_listener,
    "ranks' watch": try_rank_watch,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=2000, help="at each port (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    print("| port | unknown clients | real peers accepted after, s | received bytes are correct | lines printed |")
    print("| --- | --- | --- | --- | --- |")
    wrong = 0
    for name, try_port in PORTS.items():
        with contextlib.redirect_stdout(io.StringIO()) as output:
            outcome = try_port(chosen.clients, chosen.seed)
        lines = output.getvalue().count("warning")
        wrong += not outcome.is_correct or lines > 2
        print(
            f"| {name} | {outcome.clients} | {outcome.seconds:.1f} "
            f"| {'yes' if outcome.is_correct else 'NO'} | {lines} |"
        )
    return wrong


if __name__ == "__main__":
    sys.exit(main())
