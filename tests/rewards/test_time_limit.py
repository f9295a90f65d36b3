"""Rewards that hang, swallow what interrupts them, or want to end the run."""

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_pl.rewards import Failure, FunctionReward, Sample, ScoringConfig, time_limit
from rlhf_pl.rewards.guard import guarded_scores
from rlhf_pl.rewards.time_limit import Ended, RewardTimeout, call_limited
from rlhf_pl.utils.errors import InputError

QUICK = ScoringConfig(0.2, retries=2, backoff_s=0, on_failure="drop")


def samples(count: int) -> list[Sample]:
    return [Sample(f"p{i}", [{"role": "user", "content": "?"}], f"answer {i}") for i in range(count)]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A second of grace; and nothing is left behind by any test."""
    monkeypatch.setattr(time_limit, "GRACE_S", 0.8)
    monkeypatch.setattr(time_limit, "_AGAIN_S", 0.3)
    handlers = [signal.getsignal(n) for n in (signal.SIGALRM, signal.SIGURG, signal.SIGINT)]
    ticks, trace = bool(signal.getitimer(signal.ITIMER_REAL)[0]), sys.gettrace()
    yield
    assert [signal.getsignal(n) for n in (signal.SIGALRM, signal.SIGURG, signal.SIGINT)] == handlers
    assert bool(signal.getitimer(signal.ITIMER_REAL)[0]) == ticks  # of pytest-timeout
    assert sys.gettrace() is trace


def in_a_thread(call: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]


def wait_for_a_lock() -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def wait_for_a_byte() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.recv(1)


def take_the_alarm() -> None:
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.alarm(0)
    time.sleep(60)


@pytest.mark.parametrize(
    "hang",
    [
        lambda: time.sleep(60),
        wait_for_a_lock,
        wait_for_a_byte,
        lambda: exec("while True: pass"),
        lambda: re.match(r"(a+)+$", "a" * 60 + "b"),
        lambda: ctypes.CDLL(None).sleep(60),
        lambda: subprocess.run(["sleep", "60"], check=False),
        lambda: threading.Event().wait(),
        take_the_alarm,
    ],
)
def test_what_hangs_is_interrupted_and_tried_again(hang: Callable[[], Any]) -> None:
    calls = []

    def reward(response: str) -> float:
        calls.append(response)
        if len(calls) == 1:
            hang()
        return 1.0

    started = time.monotonic()
    found = guarded_scores(FunctionReward(reward), samples(2), QUICK)
    assert time.monotonic() - started < 5
    assert [o.reward for o in found] == [1.0, 1.0]  # type: ignore[union-attr]
    assert calls == ["answer 0", "answer 0", "answer 1"]


def swallow(_: str) -> float:
    try:
        time.sleep(60)
    except:  # noqa: E722
        return 0.0
    return 1.0


@pytest.mark.parametrize("many", [False, True])
def test_a_swallowed_interrupt_is_no_score_and_not_tried_again(many: bool) -> None:
    calls = []

    def one(response: str) -> float:
        calls.append(response)
        return swallow(response) if response == "answer 1" else 0.5

    def all_of_them(responses: list[str]) -> list[float]:
        return [one(response) for response in responses]

    found = guarded_scores(FunctionReward(all_of_them if many else one), samples(2), QUICK)
    failed = [isinstance(o, Failure) and o.kind for o in found]
    assert failed == (["timeout"] * 2 if many else [False, "timeout"])
    assert calls.count("answer 1") == 1
    with pytest.raises(InputError, match=r"one` failed for prompt_id 'p1'.*within 0.2 s.*`except Exception`"):
        guarded_scores(FunctionReward(one), samples(2), ScoringConfig(0.2))


def test_a_late_score_is_not_taken() -> None:
    """As of code that can't be interrupted, and returns in the end: here it keeps Python's lock."""
    found = call_limited(lambda: ctypes.PyDLL(None).usleep(400_000), 0.2, "r")
    assert found.timed_out
    assert in_a_thread(lambda: call_limited(lambda: time.sleep(0.5), 0.2, "r")).timed_out
    assert call_limited(lambda: time.sleep(0.1), 0.5, "r") == Ended()


def never_let_go(_: str) -> float:
    while True:
        try:
            while True:
                time.sleep(0.05)
        except BaseException:
            pass


def test_a_call_that_does_not_let_itself_be_interrupted_is_given_up(capsys: pytest.CaptureFixture[str]) -> None:
    reward = FunctionReward(lambda response: never_let_go(response) if response == "answer 1" else 0.5)
    found = guarded_scores(reward, samples(3), QUICK)
    assert [isinstance(o, Failure) and o.kind for o in found] == [False, "timeout", False]
    assert "warning: Reward `" in capsys.readouterr().out
    assert "given up" in found[1].detail  # type: ignore[union-attr]


@pytest.mark.parametrize("on_failure", ["drop", 0.0])
@pytest.mark.parametrize("run", [lambda call: call(), in_a_thread], ids=["main", "thread"])
def test_after_three_of_these_the_run_stops(on_failure: Any, run: Callable[[Callable[[], Any]], Any]) -> None:
    calls = []

    def reward(response: str) -> float:
        calls.append(response)
        return never_let_go(response) if response != "answer 0" else 0.5

    def score() -> str:
        with pytest.raises(InputError, match=r"3 times now, so the run stops.*isolate true") as error:
            guarded_scores(FunctionReward(reward), samples(8), ScoringConfig(0.1, on_failure=on_failure))
        return str(error.value)

    assert "reward" in run(score)
    assert calls == [f"answer {i}" for i in range(4)]


def test_a_rewards_own_alarm_works_and_does_not_ring_later() -> None:
    """As of `math_verify` and `timeout_decorator`."""

    def ring(*_: Any) -> None:
        raise TimeoutError("its own")

    def reward(response: str) -> float:
        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        try:
            time.sleep(5)
        except TimeoutError:
            return 0.25
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        return 1.0

    def forgets_it(response: str) -> float:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        return 0.5

    config = ScoringConfig(10, retries=0)
    assert [o.reward for o in guarded_scores(FunctionReward(reward), samples(2), config)] == [0.25] * 2  # type: ignore[union-attr]
    assert [o.reward for o in guarded_scores(FunctionReward(forgets_it), samples(1), config)] == [0.5]  # type: ignore[union-attr]
    time.sleep(0.3)


class Custom(BaseException):
    pass


@pytest.mark.parametrize(
    "error",
    [SystemExit(0), SystemExit(), SystemExit("done"), KeyboardInterrupt(), GeneratorExit(), Custom("x")],
    ids=repr,
)
@pytest.mark.parametrize("many", [False, True])
def test_what_is_meant_to_end_the_run_is_a_failure(error: BaseException, many: bool) -> None:
    calls = []

    def one(response: str) -> float:
        calls.append(response)
        raise error

    def all_of_them(responses: list[str]) -> float:
        return one(responses[0])

    for run in (lambda call: call(), in_a_thread):
        calls.clear()
        reward = FunctionReward(all_of_them if many else one)
        found = run(lambda reward=reward: guarded_scores(reward, samples(2), QUICK))
        assert [o.kind for o in found] == ["exception"] * 2
        assert f"raised {type(error).__name__}(" in found[0].detail
        assert len(calls) == (1 if many else 2)
    with pytest.raises(InputError, match=r"(one|all_of_them)` failed for prompt_id 'p0'.*raised"):
        guarded_scores(reward, samples(2), ScoringConfig())


@pytest.mark.parametrize("error", [StopIteration(3), RecursionError("x"), MemoryError(), UserWarning("x"), OSError()])
def test_every_exception_is_a_failure(error: Exception) -> None:
    def reward(response: str) -> float:
        raise error

    (found,) = guarded_scores(FunctionReward(reward), samples(1), QUICK)
    assert found.detail.startswith(f"{type(error).__name__}: ")  # type: ignore[union-attr]


@pytest.mark.parametrize("swallows", [swallow, never_let_go, time.sleep])
def test_a_stop_by_the_user_is_never_swallowed(swallows: Callable[[Any], Any]) -> None:
    """What the handler raises, here Ctrl-C, stops the caller, whatever the reward makes of it."""
    threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT]).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        guarded_scores(FunctionReward(lambda response: swallows(30)), samples(1), ScoringConfig(0))  # type: ignore[arg-type]
    assert time.monotonic() - started < 10


LOCKED = """
import sys
from rlhf_pl.rewards import FunctionReward, Sample, ScoringConfig, time_limit
from rlhf_pl.rewards.guard import guarded_scores
import ctypes
time_limit.GRACE_S, time_limit.STUCK_S = 0.5, 1.0
def locked(response): sum(range(10**13))
def stuck(response):
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex); libc.pthread_mutex_lock(mutex)
sample = Sample("p", [{"role": "user", "content": "?"}], "a")
guarded_scores(FunctionReward(globals()[sys.argv[1]]), [sample], ScoringConfig(0.3, on_failure="drop"))
"""


ENDS = [("locked", "line 7 in locked"), ("stuck", "error: Reward `stuck` did not")]


@pytest.mark.parametrize(("kind", "message"), ENDS)
def test_what_can_be_neither_interrupted_nor_given_up_ends_the_run(kind: str, message: str, tmp_path: Path) -> None:
    """C code in the main thread that keeps Python's lock, or waits for ever and is deaf to signals."""
    file = tmp_path / "locked.py"
    file.write_text(LOCKED)
    found = subprocess.run([sys.executable, file, kind], capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == 1
    assert message in found.stderr


def test_the_interrupt_is_no_exception() -> None:
    assert not issubclass(RewardTimeout, Exception)
