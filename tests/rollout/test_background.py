"""Threads beside the main one: none holds up the end, and one item stays where its CUDA device is."""

import subprocess
import sys
import threading
import time

import pytest

from rlhf_pl.rollout.background import at_once


def test_a_process_ends_while_a_server_hangs() -> None:
    code = "import time; from rlhf_pl.rollout.background import start; start(time.sleep, 300)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_all_end_before_a_failure_is_told() -> None:
    ended = []

    def act(item: int) -> int:
        if item == 0:
            raise ValueError("first")
        time.sleep(0.1)
        ended.append(item)
        return item

    with pytest.raises(ValueError, match="first"):
        at_once(act, [0, 1, 2])
    assert sorted(ended) == [1, 2]
    assert at_once(act, [2, 1]) == [2, 1]
    assert at_once(lambda _: threading.current_thread(), [1]) == [threading.current_thread()]
