"""Which server draws which prompt's answers: its own share, and what slow or lost ones leave."""

import threading
from collections import deque


class Dispatch:
    """Prompts on their way through servers, each at one server at a time.

    Every server begins with an even share. One that has room takes over what waits for another that has none, or that
    is lost. A prompt at which a server has failed is for the others, until it has failed at all of them. Called by the
    threads of all servers.

    Args:
        prompts: How many there are.
        servers: How many there are.
        concurrency: Prompts that a server works on at a time.
        first: The server of the first prompt.
    """

    def __init__(self, prompts: int, servers: int, concurrency: int, first: int = 0) -> None:
        self._waiting: list[deque[int]] = [deque() for _ in range(servers)]
        for index in range(prompts):
            self._waiting[(index + first) % servers].append(index)
        self._busy = [0] * servers
        self._room = concurrency
        self._lost: set[int] = set()
        self._tries = [0] * prompts
        self._failed_at: list[set[int]] = [set() for _ in range(prompts)]
        self._change = threading.Condition()
        self._stopped = False

    def take(self, server: int) -> int | None:
        """The next prompt for a server; waits while others may give one back. None when there is no more to do."""
        with self._change:
            while not (self._stopped or server in self._lost):
                if (queue := self._queue(server)) is not None:
                    self._busy[server] += 1
                    return queue.popleft()
                if not any(self._busy) and not any(self._waiting):
                    break
                self._change.wait()
            return None

    def done(self, server: int) -> None:
        """A server has the answers to a prompt it took."""
        with self._change:
            self._busy[server] -= 1
            self._change.notify_all()

    def failed(self, server: int, index: int) -> int:
        """Note that a server has failed at a prompt it took, and still has; gives how often the prompt has failed."""
        with self._change:
            self._tries[index] += 1
            self._failed_at[index].add(server)
            return self._tries[index]

    def give_back(self, server: int, index: int) -> None:
        """A server has no answers to a prompt it took."""
        with self._change:
            self._busy[server] -= 1
            if not (untried := self._untried(index)):
                self._failed_at[index].clear()
            elif server in self._failed_at[index]:
                server = min(untried, key=lambda other: len(self._waiting[other]))
            self._waiting[server].appendleft(index)
            self._change.notify_all()

    def lose(self, server: int) -> None:
        """A server takes no more."""
        with self._change:
            self._lost.add(server)
            self._change.notify_all()

    def is_lost(self, server: int) -> bool:
        with self._change:
            return server in self._lost

    def stop(self) -> None:
        """Give out nothing more."""
        with self._change:
            self._stopped = True
            self._change.notify_all()

    def _queue(self, server: int) -> deque[int] | None:
        """Where a server takes from: its own share, else the longest that its owner has no room for."""
        if self._waiting[server]:
            return self._waiting[server]
        left = [
            queue
            for owner, queue in enumerate(self._waiting)
            if queue
            and (owner in self._lost or self._busy[owner] >= self._room)
            and (server not in self._failed_at[queue[0]] or not self._untried(queue[0]))
        ]
        return max(left, key=len, default=None)

    def _untried(self, index: int) -> set[int]:
        """The servers that have not failed at a prompt."""
        return set(range(len(self._waiting))) - self._lost - self._failed_at[index]
