"""Rewards that exit or fork the process, or leave threads and child processes running."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_pl.rewards import Failure, FunctionReward, Sample, ScoringConfig
from rlhf_pl.rewards.guard import score_samples

QUICK = ScoringConfig(0.5, retries=0, backoff_s=0, on_failure="drop")
TWO = [Sample(f"p{i}", [{"role": "user", "content": "?"}], f"response {i}") for i in range(2)]


def test_os_exit_is_a_failure_except_in_the_rewards_child_processes() -> None:
    def reward(response: str) -> float:
        if response == "response 1":
            os._exit(0)
        if (child := os.fork()) == 0:
            os._exit(7)
        return float(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    good, bad = score_samples(FunctionReward(reward), TWO, QUICK)
    assert good.reward == 7.0  # type: ignore[union-attr]
    assert isinstance(bad, Failure)
    assert "SystemExit(0), which is meant to end the run" in bad.detail


def test_a_forked_copy_of_the_process_exits(tmp_path: Path) -> None:
    def reward(response: str) -> float:
        os.fork()
        return 1.0

    process = os.getpid()
    found = score_samples(FunctionReward(reward), TWO, QUICK)
    (tmp_path / str(os.getpid())).touch()
    if os.getpid() != process:
        os._exit(1)
    for _ in TWO:
        assert os.waitstatus_to_exitcode(os.wait()[1]) == 1
    assert [f.name for f in tmp_path.iterdir()] == [str(process)]
    assert len(found) == 2


class Exits(Exception):
    def __str__(self) -> str:
        sys.exit(0)


class Hangs(Exception):
    def __str__(self) -> str:
        time.sleep(60)
        return ""


@pytest.mark.parametrize("error", [Exits(), Hangs()], ids=lambda e: type(e).__name__)
def test_an_exception_without_a_text(error: Exception) -> None:
    def reward(response: str) -> float:
        raise error

    for failure in score_samples(FunctionReward(reward), TWO, QUICK):
        assert isinstance(failure, Failure)
        assert failure.detail == f"{type(error).__name__}, whose text is not available."


LEFTOVERS = """
import sys, threading, time
import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from rlhf_pl import __main__
from rlhf_pl.rewards import FunctionReward, Sample, ScoringConfig, process_exit
from rlhf_pl.rewards.guard import score_samples

process_exit.LEFTOVER_GRACE_S = 1.0
idle = []

def reward(response):
    if sys.argv[1] == "thread": threading.Thread(target=time.sleep, args=(600,), name="stuck").start()
    if sys.argv[1] == "pool": ThreadPoolExecutor(1, "stuck").submit(time.sleep, 600)
    if sys.argv[1] == "process": multiprocessing.get_context("fork").Process(
        target=time.sleep, args=(600,), name="stuck").start()
    if sys.argv[1] == "idle":
        idle.append(ThreadPoolExecutor(1, "stuck"))
        idle[0].submit(int).result()
    return 1.0

def main():
    score_samples(FunctionReward(reward), [Sample("p", [{"role": "user", "content": "?"}], "a")], ScoringConfig())
    return 3

__main__.main = main
__main__.command()
"""


@pytest.mark.parametrize("kind", ["thread", "pool", "process", "idle"])
def test_leftovers_of_a_reward_do_not_keep_the_command_running(kind: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LEFTOVERS, kind], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 3
    assert ("stuck" in done.stderr) == (kind != "idle")
    assert "Traceback" not in done.stderr
