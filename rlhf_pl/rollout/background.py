"""Runs work in daemon threads, which do not delay the end of the process."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def run_in_thread(action: Callable[..., Result], *arguments: Any) -> Future[Result]:
    """Call `action` in a daemon thread; threads of a ThreadPoolExecutor would delay the end of the process."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(action(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def run_parallel(action: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Call `action` for all items in parallel; a single item stays in this thread, which has the CUDA device.

    Raises:
        Exception: That of the first item that failed, raised after all calls have ended.
    """
    if len(items) == 1:
        return [action(items[0])]
    futures = [run_in_thread(action, item) for item in items]
    wait(futures)
    return [future.result() for future in futures]
