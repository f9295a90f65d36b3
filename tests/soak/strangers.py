"""Sends strangers to both ports of a run, the ranks' watch and the listener for weights; prints a Markdown table.

    python tests/soak/strangers.py [--strangers 2000] [--seed 0]

Strangers of every kind (`tests/strangers.py`) come before the real peers of a port and between them, until the port is
closed. Counted are those that came, and the seconds until all real peers were let in. Then every peer must get just the
bytes that are meant for it.
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
from tests.strangers import KINDS, visit

PEERS = 4
AT_A_TIME = 100  # connections that strangers hold open
WEIGHT = torch.arange(100_000, dtype=torch.float32)


class Outcome(NamedTuple):
    """What became of a port."""

    came: int  # strangers
    seconds: float  # until the real peers were let in, the strangers before them included
    whole: bool  # every peer got what was meant for it


class Strangers:
    """Come to a port in a thread until they are stopped, the same ones for the same seed."""

    def __init__(self, port: int, token: str, count: int, seed: int) -> None:
        self.came, self._rng = 0, random.Random(seed)
        self._where, self._stop = (port, token), threading.Event()
        self._open: list[Any] = []
        for _ in range(count // 2):
            self._one()
        self._thread = threading.Thread(target=self._rest, args=(count - self.came,))
        self._thread.start()

    def _one(self) -> None:
        self._open.append(visit(self._rng.choice(list(KINDS)), *self._where, self._rng))
        self.came += 1
        if len(self._open) > AT_A_TIME:
            self._open.pop(0).close()

    def _rest(self, count: int) -> None:
        with contextlib.suppress(OSError):  # all peers have come, so the port is closed
            while count and not self._stop.is_set():
                self._one()
                count -= 1

    def go(self) -> int:
        self._stop.set()
        self._thread.join()
        for connection in self._open:
            connection.close()
        return self.came


def weights(count: int, seed: int) -> Outcome:
    """The listener for weights, with workers as a server has."""
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
        strangers = Strangers(info["port"], info["token"], count, seed)
        working = [pool.submit(worker, number) for number in range(PEERS)]
        connected.result()
        seconds = time.monotonic() - start
        came = strangers.go()
        push.send([WEIGHT])
        return Outcome(came, seconds, all(work.result() for work in working))


def watch(count: int, seed: int) -> Outcome:
    """The ranks' watch, with all ranks in this process."""
    told: list[Any] = []
    came: list[Strangers] = []
    ready = threading.Event()

    def share(value: Any) -> Any:
        if value is not None:
            told.append(value)
            ready.set()
        ready.wait()
        return told[0]

    def rank(number: int) -> RankWatch:
        if number:
            ready.wait()
            if number == 1:
                came.append(Strangers(told[0][1], told[0][0][1], count, seed))
            time.sleep(0.1 * number)
        return RankWatch(number, PEERS + 1, share, "", True)

    start = time.monotonic()
    with ThreadPoolExecutor(PEERS + 1) as pool:
        watches = list(pool.map(rank, range(PEERS + 1)))
    seconds = time.monotonic() - start
    strangers = came[0].go()
    for number, one in enumerate(watches[1:], 1):
        one.report_phase(f"place {number}")
    end = time.monotonic() + 10
    expected = {number: f"place {number}" for number in range(1, PEERS + 1)}
    while watches[0].places != expected and time.monotonic() < end:
        time.sleep(0.01)
    whole = watches[0].places == expected
    for one in reversed(watches):
        one.close()
    return Outcome(strangers, seconds, whole)


PORTS: dict[str, Callable[[int, int], Outcome]] = {"listener for weights": weights, "ranks' watch": watch}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strangers", type=int, default=2000, help="at each port (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    print("| port | strangers that came | real peers let in after, s | their bytes were right | lines printed |")
    print("| --- | --- | --- | --- | --- |")
    wrong = 0
    for name, attack in PORTS.items():
        with contextlib.redirect_stdout(io.StringIO()) as said:
            outcome = attack(chosen.strangers, chosen.seed)
        lines = said.getvalue().count("warning")
        wrong += not outcome.whole or lines > 2
        print(f"| {name} | {outcome.came} | {outcome.seconds:.1f} | {'yes' if outcome.whole else 'NO'} | {lines} |")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
