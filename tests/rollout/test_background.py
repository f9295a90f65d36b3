"""Daemon threads do not delay the end of the process, and a single item stays in the calling thread."""

import subprocess
import sys
import threading
import time

import pytest

from rlhf_pl.rollout.background import run_parallel


def test_a_process_ends_while_a_thread_hangs() -> None:
    code = "import time; from rlhf_pl.rollout.background import run_in_thread; run_in_thread(time.sleep, 300)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_failure_is_raised_after_all_calls_have_ended() -> None:
    finished = []

    def act(item: int) -> int:
        if item == 0:
            raise ValueError("first")
        time.sleep(0.1)
        finished.append(item)
        return item

    with pytest.raises(ValueError, match="first"):
        run_parallel(act, [0, 1, 2])
    assert sorted(finished) == [1, 2]
    assert run_parallel(act, [2, 1]) == [2, 1]
    assert run_parallel(lambda _: threading.current_thread(), [1]) == [threading.current_thread()]
