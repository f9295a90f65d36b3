"""Scoring beside generation, for rewards that are computed elsewhere."""

import threading
from queue import SimpleQueue
from types import TracebackType

from rlhf_pl.rounds.stages.score import ShardScorer


class ScoreAhead:
    """Scores shards in a thread while later ones are drawn; what is left at the end of the block is for `score`.

    Args:
        scorer: Scores a shard.
        enabled: If not, all is left.
    """

    def __init__(self, scorer: ShardScorer, enabled: bool = True) -> None:
        self._scorer, self._enabled = scorer, enabled
        self._numbers: SimpleQueue[int | None] = SimpleQueue()
        self._stopped = threading.Event()
        self._error: BaseException | None = None
        # a daemon: an interrupted run need not wait for a server
        self._thread = threading.Thread(target=self._work, name="score-ahead", daemon=True)

    def __enter__(self) -> "ScoreAhead":
        if self._enabled:
            self._thread.start()
        return self

    def add(self, number: int) -> None:
        """Shard `number` has been drawn.

        Raises:
            InputError: Scoring one before it failed.
        """
        if self._error is not None:
            raise self._error
        self._numbers.put(number)

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._stopped.set()
        self._numbers.put(None)
        if kind is None and self._enabled:
            self._thread.join()  # for the length of one call
            if self._error is not None:
                raise self._error

    def _work(self) -> None:
        try:
            while (number := self._numbers.get()) is not None and not self._stopped.is_set():
                self._scorer(number, go_on=lambda: not self._stopped.is_set())
        except BaseException as error:  # for the thread that draws, whatever it is
            self._error = error
