"""Work beside the main thread that no one has to wait for when the process ends."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def start(action: Callable[..., Result], *arguments: Any) -> Future[Result]:
    """Call it in a thread of its own, which ends with the process; those of a ThreadPoolExecutor would hold that up."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(action(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def at_once(action: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Call it for all items side by side; a single one stays in this thread, and so with its CUDA device.

    Raises:
        Exception: The first item's that failed, after all have ended.
    """
    if len(items) == 1:
        return [action(items[0])]
    futures = [start(action, item) for item in items]
    wait(futures)
    return [future.result() for future in futures]
