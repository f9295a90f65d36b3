"""Scores shards while later ones are sampled, for rewards that are computed elsewhere."""

import threading
from queue import SimpleQueue
from types import TracebackType

from rlhf_pl.rounds.stages.score import ShardScorer


class ScoreAhead:
    """Scores shards in a thread while later shards are sampled; `score` does the rest after the block.

    Args:
        scorer: Scores a shard.
        enabled: Whether the thread runs; if not, all shards are left to `score`.
    """

    def __init__(self, scorer: ShardScorer, enabled: bool = True) -> None:
        self._scorer, self._enabled = scorer, enabled
        self._numbers: SimpleQueue[int | None] = SimpleQueue()
        self._stopped = threading.Event()
        self._error: BaseException | None = None
        # a daemon, so that an interrupted run does not wait for a server
        self._thread = threading.Thread(target=self._work, name="score-ahead", daemon=True)

    def __enter__(self) -> "ScoreAhead":
        if self._enabled:
            self._thread.start()
        return self

    def add(self, number: int) -> None:
        """Queue shard `number`, whose responses are written.

        Raises:
            InputError: Scoring an earlier shard failed.
        """
        if self._error is not None:
            raise self._error
        self._numbers.put(number)

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._stopped.set()
        self._numbers.put(None)
        if kind is None and self._enabled:
            self._thread.join()  # takes at most one call of the reward
            if self._error is not None:
                raise self._error

    def _work(self) -> None:
        try:
            while (number := self._numbers.get()) is not None and not self._stopped.is_set():
                self._scorer(number, should_continue=lambda: not self._stopped.is_set())
        except BaseException as error:  # raised again in the thread that samples
            self._error = error
