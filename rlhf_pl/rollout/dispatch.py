"""Assigns prompts to servers: an even share to each, and waiting prompts of slow or lost servers to the others."""

import threading
from collections import deque


class Dispatch:
    """Queues of prompts for servers; a prompt is at one server at a time.

    Every server starts with an even share. A server with free slots takes prompts that wait for a busy or lost server.
    A prompt that failed at a server goes to the others, until it has failed at all of them. Thread-safe: the threads of
    all servers call it.

    Args:
        prompts: Number of prompts.
        servers: Number of servers.
        concurrency: Prompts that a server works on at a time.
        first: Index of the first prompt's server.
    """

    def __init__(self, prompts: int, servers: int, concurrency: int, first: int = 0) -> None:
        self._waiting: list[deque[int]] = [deque() for _ in range(servers)]
        for index in range(prompts):
            self._waiting[(index + first) % servers].append(index)
        self._busy = [0] * servers
        self._concurrency = concurrency
        self._lost: set[int] = set()
        self._tries = [0] * prompts
        self._failed_at: list[set[int]] = [set() for _ in range(prompts)]
        self._change = threading.Condition()
        self._stopped = False

    def take(self, server: int) -> int | None:
        """The next prompt for a server; blocks while others may put one back. None if all work is done."""
        with self._change:
            while not (self._stopped or server in self._lost):
                if (queue := self._find_queue(server)) is not None:
                    self._busy[server] += 1
                    return queue.popleft()
                if not any(self._busy) and not any(self._waiting):
                    break
                self._change.wait()
            return None

    def mark_done(self, server: int) -> None:
        """Record that a server has returned the responses to a prompt."""
        with self._change:
            self._busy[server] -= 1
            self._change.notify_all()

    def record_failure(self, server: int, index: int) -> int:
        """Record that a prompt failed at a server, which keeps it for now; returns how often the prompt has failed."""
        with self._change:
            self._tries[index] += 1
            self._failed_at[index].add(server)
            return self._tries[index]

    def put_back(self, server: int, index: int) -> None:
        """Return a prompt without responses to the queues."""
        with self._change:
            self._busy[server] -= 1
            if not (untried := self._untried_servers(index)):
                self._failed_at[index].clear()
            elif server in self._failed_at[index]:
                server = min(untried, key=lambda other: len(self._waiting[other]))
            self._waiting[server].appendleft(index)
            self._change.notify_all()

    def mark_lost(self, server: int) -> None:
        """Give a server no more prompts."""
        with self._change:
            self._lost.add(server)
            self._change.notify_all()

    def is_lost(self, server: int) -> bool:
        with self._change:
            return server in self._lost

    def stop(self) -> None:
        """Give no server more prompts."""
        with self._change:
            self._stopped = True
            self._change.notify_all()

    def _find_queue(self, server: int) -> deque[int] | None:
        """A server's own queue, or else the longest queue that it may take from; None if there is none."""
        if self._waiting[server]:
            return self._waiting[server]
        candidates = [
            queue
            for owner, queue in enumerate(self._waiting)
            if queue
            and (owner in self._lost or self._busy[owner] >= self._concurrency)
            and (server not in self._failed_at[queue[0]] or not self._untried_servers(queue[0]))
        ]
        return max(candidates, key=len, default=None)

    def _untried_servers(self, index: int) -> set[int]:
        """The servers at which a prompt has not failed."""
        return set(range(len(self._waiting))) - self._lost - self._failed_at[index]
