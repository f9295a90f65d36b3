"""Rewards that hang, swallow interrupts, or try to end the run."""

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
from rlhf_pl.rewards.guard import score_samples
from rlhf_pl.rewards.time_limit import CallResult, RewardTimeout, call_with_time_limit
from rlhf_pl.utils.errors import InputError

QUICK = ScoringConfig(0.2, retries=2, backoff_s=0, on_failure="drop")
end_of_test = threading.Event()  # stops abandoned threads, so that they do not run beside other tests


def samples(count: int) -> list[Sample]:
    return [Sample(f"p{i}", [{"role": "user", "content": "?"}], f"response {i}") for i in range(count)]


@pytest.fixture(autouse=True)
def short_grace(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A grace of a second; every test must restore handlers, timers and trace functions."""
    monkeypatch.setattr(time_limit, "GRACE_S", 0.8)
    monkeypatch.setattr(time_limit, "_REPEAT_S", 0.3)
    handlers = [signal.getsignal(n) for n in (signal.SIGALRM, signal.SIGURG, signal.SIGINT)]
    end_of_test.clear()
    has_timer, trace = bool(signal.getitimer(signal.ITIMER_REAL)[0]), sys.gettrace()
    yield
    end_of_test.set()
    assert [signal.getsignal(n) for n in (signal.SIGALRM, signal.SIGURG, signal.SIGINT)] == handlers
    assert bool(signal.getitimer(signal.ITIMER_REAL)[0]) == has_timer  # of pytest-timeout
    assert sys.gettrace() is trace


def run_in_thread(call: Callable[[], Any]) -> Any:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    thread.join()
    return results[0]


def wait_for_a_lock() -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def wait_for_a_byte() -> None:
    first, second = socket.socketpair()
    with first, second:
        first.recv(1)


def replace_alarm() -> None:
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
        replace_alarm,
    ],
)
def test_a_hanging_call_is_interrupted_and_retried(hang: Callable[[], Any]) -> None:
    calls = []

    def reward(response: str) -> float:
        calls.append(response)
        if len(calls) == 1:
            hang()
        return 1.0

    started = time.monotonic()
    found = score_samples(FunctionReward(reward), samples(2), QUICK)
    assert time.monotonic() - started < 5
    assert [o.reward for o in found] == [1.0, 1.0]  # type: ignore[union-attr]
    assert calls == ["response 0", "response 0", "response 1"]


def swallow_interrupt(_: str) -> float:
    try:
        time.sleep(60)
    except:  # noqa: E722
        return 0.0
    return 1.0


@pytest.mark.parametrize("batched", [False, True])
def test_a_swallowed_interrupt_is_a_failure_and_not_retried(batched: bool) -> None:
    calls = []

    def one(response: str) -> float:
        calls.append(response)
        return swallow_interrupt(response) if response == "response 1" else 0.5

    def score_all(responses: list[str]) -> list[float]:
        return [one(response) for response in responses]

    found = score_samples(FunctionReward(score_all if batched else one), samples(2), QUICK)
    failed = [isinstance(o, Failure) and o.kind for o in found]
    assert failed == (["timeout"] * 2 if batched else [False, "timeout"])
    assert calls.count("response 1") == 1
    with pytest.raises(InputError, match=r"one` failed for prompt_id 'p1'.*within 0.2 s.*`except Exception`"):
        score_samples(FunctionReward(one), samples(2), ScoringConfig(0.2))


def test_a_late_score_is_not_used() -> None:
    """Of code that can't be interrupted but returns eventually; here it holds the GIL."""
    found = call_with_time_limit(lambda: ctypes.PyDLL(None).usleep(400_000), 0.2, "r")
    assert found.timed_out
    assert run_in_thread(lambda: call_with_time_limit(lambda: time.sleep(0.5), 0.2, "r")).timed_out
    assert call_with_time_limit(lambda: time.sleep(0.1), 0.5, "r") == CallResult()


def swallow_everything(_: str) -> float:
    while True:
        try:
            while True:
                time.sleep(0.05)
                if end_of_test.is_set():
                    return 0.0
        except BaseException:
            pass


def test_a_call_that_cannot_be_interrupted_is_abandoned(capsys: pytest.CaptureFixture[str]) -> None:
    reward = FunctionReward(lambda response: swallow_everything(response) if response == "response 1" else 0.5)
    found = score_samples(reward, samples(3), QUICK)
    assert [isinstance(o, Failure) and o.kind for o in found] == [False, "timeout", False]
    assert "warning: Reward `" in capsys.readouterr().out
    assert "abandoned" in found[1].detail  # type: ignore[union-attr]


@pytest.mark.parametrize("on_failure", ["drop", 0.0])
@pytest.mark.parametrize("run", [lambda call: call(), run_in_thread], ids=["main", "thread"])
def test_the_run_stops_after_three_abandoned_calls(on_failure: Any, run: Callable[[Callable[[], Any]], Any]) -> None:
    calls = []

    def reward(response: str) -> float:
        calls.append(response)
        return swallow_everything(response) if response != "response 0" else 0.5

    def score() -> str:
        with pytest.raises(InputError, match=r"3 times, so the run stops.*isolate true") as error:
            score_samples(FunctionReward(reward), samples(8), ScoringConfig(0.1, on_failure=on_failure))
        return str(error.value)

    assert "reward" in run(score)
    assert calls == [f"response {i}" for i in range(4)]


def test_a_rewards_own_alarm_works_and_does_not_fire_later() -> None:
    """`math_verify` and `timeout_decorator` use alarms."""

    def raise_timeout(*_: Any) -> None:
        raise TimeoutError("its own")

    def reward(response: str) -> float:
        before = signal.signal(signal.SIGALRM, raise_timeout)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        try:
            time.sleep(5)
        except TimeoutError:
            return 0.25
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        return 1.0

    def leaves_alarm_set(response: str) -> float:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        return 0.5

    config = ScoringConfig(10, retries=0)
    assert [o.reward for o in score_samples(FunctionReward(reward), samples(2), config)] == [0.25] * 2  # type: ignore[union-attr]
    assert [o.reward for o in score_samples(FunctionReward(leaves_alarm_set), samples(1), config)] == [0.5]  # type: ignore[union-attr]
    time.sleep(0.3)


class CustomError(BaseException):
    pass


@pytest.mark.parametrize(
    "error",
    [SystemExit(0), SystemExit(), SystemExit("done"), KeyboardInterrupt(), GeneratorExit(), CustomError("x")],
    ids=repr,
)
@pytest.mark.parametrize("batched", [False, True])
def test_exceptions_that_would_end_the_run_are_failures(error: BaseException, batched: bool) -> None:
    calls = []

    def one(response: str) -> float:
        calls.append(response)
        raise error

    def score_all(responses: list[str]) -> float:
        return one(responses[0])

    for run in (lambda call: call(), run_in_thread):
        calls.clear()
        reward = FunctionReward(score_all if batched else one)
        found = run(lambda reward=reward: score_samples(reward, samples(2), QUICK))
        assert [o.kind for o in found] == ["exception"] * 2
        assert f"raised {type(error).__name__}(" in found[0].detail
        assert len(calls) == (1 if batched else 2)
    with pytest.raises(InputError, match=r"(one|score_all)` failed for prompt_id 'p0'.*raised"):
        score_samples(reward, samples(2), ScoringConfig())


@pytest.mark.parametrize("error", [StopIteration(3), RecursionError("x"), MemoryError(), UserWarning("x"), OSError()])
def test_every_exception_is_a_failure(error: Exception) -> None:
    def reward(response: str) -> float:
        raise error

    (found,) = score_samples(FunctionReward(reward), samples(1), QUICK)
    assert found.detail.startswith(f"{type(error).__name__}: ")  # type: ignore[union-attr]


@pytest.mark.parametrize("swallows", [swallow_interrupt, swallow_everything, time.sleep])
def test_a_stop_by_the_user_is_never_swallowed(swallows: Callable[[Any], Any]) -> None:
    """The exception of a signal handler, here of Ctrl-C, stops the caller even if the reward swallows it."""
    threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT]).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        score_samples(FunctionReward(lambda response: swallows(30)), samples(1), ScoringConfig(0))  # type: ignore[arg-type]
    assert time.monotonic() - started < 10


BLOCKING = """
import sys
from rlhf_pl.rewards import FunctionReward, Sample, ScoringConfig, time_limit
from rlhf_pl.rewards.guard import score_samples
import ctypes
time_limit.GRACE_S, time_limit.STUCK_S = 0.5, 1.0
def holds_gil(response): sum(range(10**13))
def stuck(response):
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex); libc.pthread_mutex_lock(mutex)
sample = Sample("p", [{"role": "user", "content": "?"}], "a")
score_samples(FunctionReward(globals()[sys.argv[1]]), [sample], ScoringConfig(0.3, on_failure="drop"))
"""


FATAL = [("holds_gil", "line 7 in holds_gil"), ("stuck", "error: Reward `stuck` did not")]


@pytest.mark.parametrize(("kind", "message"), FATAL)
def test_a_call_that_can_only_be_killed_ends_the_run(kind: str, message: str, tmp_path: Path) -> None:
    """C code in the main thread that holds the GIL, or waits forever and ignores signals."""
    file = tmp_path / "blocking.py"
    file.write_text(BLOCKING)
    found = subprocess.run([sys.executable, file, kind], capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == 1
    assert message in found.stderr


def test_the_interrupt_is_not_an_exception_subclass() -> None:
    assert not issubclass(RewardTimeout, Exception)
