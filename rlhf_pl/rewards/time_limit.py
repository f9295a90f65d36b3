"""Calls of users' code with a time limit. A call over its limit has failed. A stop of the run is never swallowed.

In the main thread, a call is interrupted while it sleeps, waits for a socket or a lock, or computes in Python. The
kernel's timer interrupts it, which needs no Python thread. If a reward uses that timer itself, a watcher thread sends
SIGURG, which is ignored by default. Other threads don't receive signals: there, the call runs in a thread of its own,
which can be abandoned.
"""

import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any, Generic, TypeVar

T = TypeVar("T")
GRACE_S = 5.0  # an interrupted call may clean up for this long; then it is stopped by force, or abandoned
STUCK_S = 30.0  # if the call still blocks the main thread this long after that, the run ends
MAX_LIMIT_S = 1e8  # three years; longer limits are reduced to this
_REPEAT_S = 1.0  # interval at which a swallowed interrupt is repeated
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class RewardTimeout(BaseException):
    """The time limit has passed. Not an Exception, so that a reward's `except Exception` does not catch it."""


@dataclass
class CallResult(Generic[T]):
    """How a call ended.

    Args:
        value: What it returned.
        error: What it raised.
        timed_out: Whether it exceeded its limit, whatever it returned or raised.
        swallowed: Whether it returned after an interrupt.
        is_abandoned: Whether it could not be interrupted: it was stopped by force, or is still running.
    """

    value: T | None = None
    error: BaseException | None = None
    timed_out: bool = False
    swallowed: bool = False
    is_abandoned: bool = False


def call_with_time_limit(call: Callable[[], T], seconds: float, name: str) -> CallResult[T]:
    """Call a function with a time limit.

    If a signal handler raises during the call (Ctrl-C), its exception also stops the caller, even if the call
    swallowed it.

    Args:
        call: Users' code.
        seconds: The limit; 0 for no limit.
        name: The reward's name, for the message if the run must end.
    """
    seconds = min(seconds, MAX_LIMIT_S)
    if threading.current_thread() is not threading.main_thread():
        return _call_in_thread(call, seconds) if seconds else _call_unlimited(call)
    interrupter = _Interrupter(seconds, name)
    result: CallResult[T] = CallResult()
    try:
        interrupter.start()
        try:
            result.value = call()
        finally:
            interrupter.is_active = False
    except BaseException as error:  # users' code may raise anything
        interrupter.is_active = False
        result.error = error
    result.timed_out, result.is_abandoned = interrupter.has_expired, interrupter.is_forced
    interrupter.close()
    if interrupter.stop is not None:
        raise interrupter.stop
    result.swallowed = result.error is None and interrupter.has_raised
    return result


class _Interrupter:
    """Raises in the main thread: RewardTimeout over the limit, or again the exception of a signal handler."""

    def __init__(self, seconds: float, name: str) -> None:
        self._seconds, self._name = seconds, name
        self._started = time.monotonic()
        self._handlers: dict[int, Any] = {}
        self._outer_timer = (0.0, 0.0)  # set before the call
        self._trace: Any = None
        self._outer_interrupter = _watched[0]
        self._first_interrupt: float | None = None  # when it was first interrupted
        self.is_active, self.has_raised, self.is_forced = True, False, False
        self.stop: BaseException | None = None

    @property
    def has_expired(self) -> bool:
        return self._seconds > 0 and time.monotonic() - self._started >= self._seconds

    def start(self) -> None:
        for number in _STOPS:
            if callable(handler := signal.getsignal(number)):
                self._handlers[number] = handler
                signal.signal(number, self._relay)
        for number in (signal.SIGURG, signal.SIGALRM):
            self._handlers[number] = signal.signal(number, self._interrupt)
        self._outer_timer = signal.setitimer(signal.ITIMER_REAL, self._seconds, _REPEAT_S)
        _watch(self)

    def close(self) -> None:
        _watch(self._outer_interrupter)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        remaining, interval = self._outer_timer
        if remaining:
            remaining -= time.monotonic() - self._started
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, remaining), interval)
        if self.is_forced:
            sys.settrace(self._trace)

    def _relay(self, number: int, frame: FrameType | None) -> None:
        """Call the run's handler of this signal, and record the exception if it raises."""
        try:
            self._handlers[number](number, frame)
        except BaseException as stop:
            if self.stop is None:
                self.stop = stop
            raise

    def repeat_interrupt(self) -> None:
        """Interrupt again if necessary. The watcher thread calls this every second."""
        if self.has_expired or self.stop is not None:
            self._first_interrupt = self._first_interrupt or time.monotonic()
            if time.monotonic() - self._first_interrupt > GRACE_S + STUCK_S:
                self._exit_run()
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGURG)

    def _interrupt(self, _number: int, frame: FrameType | None) -> None:
        if not self.is_active or (self.stop is None and not self.has_expired):
            return
        if self._first_interrupt is None:
            self._first_interrupt = time.monotonic()
        if time.monotonic() - self._first_interrupt > GRACE_S:
            if not self.is_forced:
                self.is_forced, self._trace = True, sys.gettrace()
            self._raise_everywhere(frame)
        self.has_raised = True
        raise self._make_error()

    def _raise_everywhere(self, frame: FrameType | None) -> None:
        """Make the next line of users' code raise too: the line of the `except` that swallows the interrupt."""

        def tracer(frame: FrameType, event: str, _arg: Any) -> Any:
            if not self.is_active or frame.f_code.co_filename.startswith(_PACKAGE):
                return None
            if event == "line":
                raise self._make_error()
            return tracer

        while frame is not None and frame.f_code.co_filename != __file__:
            frame.f_trace = tracer
            frame = frame.f_back
        sys.settrace(tracer)

    def _make_error(self) -> BaseException:
        return RewardTimeout() if self.stop is None else self.stop

    def _exit_run(self) -> None:
        with suppress(OSError, ValueError):
            sys.stderr.write(
                f"\nerror: Reward `{self._name}` did not return within its time limit and can't be interrupted: it is "
                "inside a library that never returns to Python. The run ends; scores so far are kept. With "
                "--rollout.scoring.isolate true, functions run in a separate process, which can be killed.\n"
            )
            sys.stderr.flush()
        os._exit(1)


@contextmanager
def exit_if_gil_is_held(seconds: float) -> Iterator[None]:
    """Exit the process if code in the block holds the GIL so long that calls with this limit can't be interrupted.

    No signal handler and no other thread can run then. `faulthandler` exits the process without the GIL, and prints
    where it hangs.
    """
    if seconds == 0 or threading.current_thread() is not threading.main_thread():
        yield
        return
    _gil_limit_s[0] = min(seconds, MAX_LIMIT_S) + GRACE_S + STUCK_S
    faulthandler.dump_traceback_later(_gil_limit_s[0], exit=True, file=2)
    try:
        yield
    finally:
        _gil_limit_s[0] = 0.0
        faulthandler.cancel_dump_traceback_later()


_gil_limit_s = [0.0]  # seconds that the GIL may be held; 0 outside of `exit_if_gil_is_held`
_watched: list[_Interrupter | None] = [None]
_watcher: list[threading.Thread] = []


def _watch(interrupter: _Interrupter | None) -> None:
    """Make the watcher thread watch this call, and no other."""
    _watched[0] = interrupter
    if interrupter is not None and not (_watcher and _watcher[0].is_alive()):
        _watcher[:] = [threading.Thread(target=_watch_forever, name="reward-limit", daemon=True)]
        _watcher[0].start()


def _watch_forever() -> None:
    while True:
        time.sleep(_REPEAT_S)
        if _gil_limit_s[0]:  # this thread runs, so the GIL is free: restart the timer
            faulthandler.dump_traceback_later(_gil_limit_s[0], exit=True, file=2)
            if not _gil_limit_s[0]:  # the block has ended meanwhile
                faulthandler.cancel_dump_traceback_later()
        if (interrupter := _watched[0]) is not None:
            interrupter.repeat_interrupt()


def _call_unlimited(call: Callable[[], T]) -> CallResult[T]:
    try:
        return CallResult(call())
    except BaseException as error:  # users' code may raise anything
        return CallResult(error=error)


def _call_in_thread(call: Callable[[], T], seconds: float) -> CallResult[T]:
    """Call in a new thread, which is abandoned if it neither returns nor can be interrupted."""
    results: list[CallResult[T]] = []
    thread = threading.Thread(target=lambda: results.append(_call_unlimited(call)), name="reward-call", daemon=True)
    thread.start()
    thread.join(seconds)
    if not thread.is_alive():
        return results[0]
    until = time.monotonic() + GRACE_S
    while thread.is_alive() and time.monotonic() < until:
        assert thread.ident is not None
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(RewardTimeout))
        thread.join(_REPEAT_S)
    return CallResult(timed_out=True, is_abandoned=thread.is_alive())
