"""Calls of users' code under a time limit: over it, a call has failed, and a stop of the run is never swallowed.

In the main thread a call is interrupted: sleeping, waiting for a socket or a lock, or computing in Python. The
kernel's timer does it, which needs no thread of Python's; where a reward takes that timer for itself, a thread does it
by SIGURG, which does nothing where nobody asks for it. In other threads, where signals don't arrive, a call runs in a
thread that can be left behind.
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
GRACE_S = 5.0  # a call that is interrupted may clean up so long; then it is ended by force, or given up
STUCK_S = 30.0  # a call that has not even then come back after so long ends the run: it is in the main thread's way
LONGEST_S = 1e8  # three years; a longer limit counts as this
_AGAIN_S = 1.0  # an interrupt that was swallowed is repeated
_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class RewardTimeout(BaseException):
    """The time limit is over. Not an Exception, so that a reward's own `except Exception` lets it through."""


@dataclass
class Ended(Generic[T]):
    """How a call ended.

    Args:
        value: What it returned.
        error: What it raised.
        timed_out: Whether it ran over its limit, whatever it returned or raised.
        swallowed: Whether it returned although it had been interrupted.
        given_up: Whether it did not let itself be interrupted: it was ended by force, or is still running.
    """

    value: T | None = None
    error: BaseException | None = None
    timed_out: bool = False
    swallowed: bool = False
    given_up: bool = False


def call_limited(call: Callable[[], T], seconds: float, name: str) -> Ended[T]:
    """Call, for at most so many seconds; 0 for no limit.

    A signal whose handler raises during the call (Ctrl-C) stops the caller as well, whatever the call makes of it.

    Args:
        call: Users' code.
        seconds: The limit.
        name: Of the reward, for the message if the run must end.
    """
    seconds = min(seconds, LONGEST_S)
    if threading.current_thread() is not threading.main_thread():
        return _in_a_thread(call, seconds) if seconds else _run(call)
    interrupter = _Interrupter(seconds, name)
    ended: Ended[T] = Ended()
    try:
        interrupter.start()
        try:
            ended.value = call()
        finally:
            interrupter.active = False
    except BaseException as error:  # users' code may raise anything
        interrupter.active = False
        ended.error = error
    ended.timed_out, ended.given_up = interrupter.is_over, interrupter.forced
    interrupter.close()
    if interrupter.stop is not None:
        raise interrupter.stop
    ended.swallowed = ended.error is None and interrupter.raised
    return ended


class _Interrupter:
    """Raises in the main thread: RewardTimeout over the limit, and again what a signal's handler raised."""

    def __init__(self, seconds: float, name: str) -> None:
        self._seconds, self._name = seconds, name
        self._started = time.monotonic()
        self._handlers: dict[int, Any] = {}
        self._alarm = (0.0, 0.0)  # somebody else's
        self._trace: Any = None
        self._outer = _watched[0]
        self._since: float | None = None  # when it was interrupted first
        self.active, self.raised, self.forced = True, False, False
        self.stop: BaseException | None = None

    @property
    def is_over(self) -> bool:
        return self._seconds > 0 and time.monotonic() - self._started >= self._seconds

    def start(self) -> None:
        for number in _STOPS:
            if callable(handler := signal.getsignal(number)):
                self._handlers[number] = handler
                signal.signal(number, self._relay)
        for number in (signal.SIGURG, signal.SIGALRM):
            self._handlers[number] = signal.signal(number, self._interrupt)
        self._alarm = signal.setitimer(signal.ITIMER_REAL, self._seconds, _AGAIN_S)
        _watch(self)

    def close(self) -> None:
        _watch(self._outer)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        remaining, interval = self._alarm
        if remaining:
            left = remaining - (time.monotonic() - self._started)
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, left), interval)
        if self.forced:
            sys.settrace(self._trace)

    def _relay(self, number: int, frame: FrameType | None) -> None:
        """Do what the run does at this signal, and note it if that is to stop."""
        try:
            self._handlers[number](number, frame)
        except BaseException as stop:
            if self.stop is None:
                self.stop = stop
            raise

    def remind(self) -> None:
        """Called every second by the watching thread."""
        if self.is_over or self.stop is not None:
            self._since = self._since or time.monotonic()
            if time.monotonic() - self._since > GRACE_S + STUCK_S:
                self._end_the_run()
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGURG)

    def _interrupt(self, _number: int, frame: FrameType | None) -> None:
        if not self.active or (self.stop is None and not self.is_over):
            return
        if self._since is None:
            self._since = time.monotonic()
        if time.monotonic() - self._since > GRACE_S:
            if not self.forced:
                self.forced, self._trace = True, sys.gettrace()
            self._raise_everywhere(frame)
        self.raised = True
        raise self._error()

    def _raise_everywhere(self, frame: FrameType | None) -> None:
        """Have the next line of users' code raise too: that of the `except` which swallows the interrupt."""

        def tracer(frame: FrameType, event: str, _arg: Any) -> Any:
            if not self.active or frame.f_code.co_filename.startswith(_OURS):
                return None
            if event == "line":
                raise self._error()
            return tracer

        while frame is not None and frame.f_code.co_filename != __file__:
            frame.f_trace = tracer
            frame = frame.f_back
        sys.settrace(tracer)

    def _error(self) -> BaseException:
        return RewardTimeout() if self.stop is None else self.stop

    def _end_the_run(self) -> None:
        with suppress(OSError, ValueError):
            sys.stderr.write(
                f"\nerror: Reward `{self._name}` did not come back within its time limit and can't be interrupted: it "
                "is inside a library that never returns to Python. The run ends; answers scored so far are kept. With "
                "--rollout.scoring.isolate true functions run in a process of their own, which can be killed.\n"
            )
            sys.stderr.flush()
        os._exit(1)


@contextmanager
def ends_if_locked(seconds: float) -> Iterator[None]:
    """End the process if code in the block keeps Python's lock so long that calls under this limit can't be ended.

    Nothing in Python can do anything then: neither a signal's handler nor a thread gets to run. What ends the process
    needs no lock, and says where it hangs.
    """
    if seconds == 0 or threading.current_thread() is not threading.main_thread():
        yield
        return
    _patience[0] = min(seconds, LONGEST_S) + GRACE_S + STUCK_S
    faulthandler.dump_traceback_later(_patience[0], exit=True, file=2)
    try:
        yield
    finally:
        _patience[0] = 0.0
        faulthandler.cancel_dump_traceback_later()


_patience = [0.0]  # seconds that the lock may be kept; 0 while nobody minds
_watched: list[_Interrupter | None] = [None]
_watcher: list[threading.Thread] = []


def _watch(interrupter: _Interrupter | None) -> None:
    """Have the watching thread remind this call, and no other, that it is over."""
    _watched[0] = interrupter
    if interrupter is not None and not (_watcher and _watcher[0].is_alive()):
        _watcher[:] = [threading.Thread(target=_remind, name="reward-limit", daemon=True)]
        _watcher[0].start()


def _remind() -> None:
    while True:
        time.sleep(_AGAIN_S)
        if _patience[0]:  # this thread runs, so the lock is not kept: begin anew
            faulthandler.dump_traceback_later(_patience[0], exit=True, file=2)
            if not _patience[0]:  # it is over meanwhile
                faulthandler.cancel_dump_traceback_later()
        if (interrupter := _watched[0]) is not None:
            interrupter.remind()


def _run(call: Callable[[], T]) -> Ended[T]:
    try:
        return Ended(call())
    except BaseException as error:  # users' code may raise anything
        return Ended(error=error)


def _in_a_thread(call: Callable[[], T], seconds: float) -> Ended[T]:
    """In a thread of its own, which is left behind if it neither returns nor can be interrupted."""
    found: list[Ended[T]] = []
    thread = threading.Thread(target=lambda: found.append(_run(call)), name="reward-call", daemon=True)
    thread.start()
    thread.join(seconds)
    if not thread.is_alive():
        return found[0]
    until = time.monotonic() + GRACE_S
    while thread.is_alive() and time.monotonic() < until:
        assert thread.ident is not None
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(RewardTimeout))
        thread.join(_AGAIN_S)
    return Ended(timed_out=True, given_up=thread.is_alive())
