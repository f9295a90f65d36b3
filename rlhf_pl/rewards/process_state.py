"""Process state that users' code may change, restored after each call."""

import gc
import io
import locale
import os
import random
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any

import numpy as np
import torch

_SIGNALS = sorted({*signal.valid_signals()} - {signal.SIGKILL, signal.SIGSTOP})


def _set_deterministic(mode: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(mode[0], warn_only=mode[1])


def _set_locale(name: str) -> None:
    locale.setlocale(locale.LC_ALL, name)


def _set_gc(enabled: bool) -> None:
    (gc.enable if enabled else gc.disable)()


def _get_umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


_SETTINGS: list[tuple[Callable[[], Any], Callable[[Any], object]]] = [
    (os.getcwd, os.chdir),
    (_get_umask, os.umask),
    (lambda: signal.pthread_sigmask(signal.SIG_BLOCK, ()), lambda m: signal.pthread_sigmask(signal.SIG_SETMASK, m)),
    (lambda: locale.setlocale(locale.LC_ALL), _set_locale),
    (sys.getrecursionlimit, sys.setrecursionlimit),
    (socket.getdefaulttimeout, socket.setdefaulttimeout),
    (gc.isenabled, _set_gc),
    (torch.is_grad_enabled, torch._C._set_grad_enabled),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.get_default_device, lambda _: torch.set_default_device(None)),
    (
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        _set_deterministic,
    ),
    (lambda: torch.backends.cudnn.benchmark, lambda on: setattr(torch.backends.cudnn, "benchmark", on)),
    (lambda: torch.backends.cudnn.deterministic, lambda on: setattr(torch.backends.cudnn, "deterministic", on)),
]


class SettingsGuard:
    """Restores process settings after the block, so that an `os.chdir` of users' code does not affect the run.

    These are the working directory, the umask, blocked signals, the locale, limits, settings of torch and the standard
    streams. Takes 30 microseconds.
    """

    def __enter__(self) -> None:
        self._settings = [_read(get) for get, _ in _SETTINGS]
        self._streams = (sys.stdin, sys.stdout, sys.stderr)
        _save_descriptors()

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        for (get, restore), before in zip(_SETTINGS, self._settings, strict=True):
            if before is not _UNKNOWN and _read(get) != before:
                restore(before)
        sys.stdin, sys.stdout, sys.stderr = self._streams
        _reopen_streams()


class ProcessGuard:
    """Gives users' code separate random generators in the block, and restores signal handlers and timers after it.

    It acts only in the main thread: in another thread it would change the state of the run, which continues meanwhile.
    """

    def __enter__(self) -> None:
        self._is_main_thread = threading.current_thread() is threading.main_thread()
        if self._is_main_thread:
            self._handlers = [signal.getsignal(number) for number in _SIGNALS]
            self._run_states = _generator_states()
            if _user_states:
                _restore_generators(_user_states)

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if not self._is_main_thread:
            return
        _user_states[:] = _generator_states()
        _restore_generators(self._run_states)
        for timer in (signal.ITIMER_VIRTUAL, signal.ITIMER_PROF):
            signal.setitimer(timer, 0)
        for number, handler in zip(_SIGNALS, self._handlers, strict=True):
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)


_user_states: list[Any] = []  # states of the random generators after the last call of users' code


_UNKNOWN = object()


def _read(get: Callable[[], Any]) -> Any:
    try:
        return get()
    except (OSError, RuntimeError, ValueError):  # for example if the working directory was deleted
        return _UNKNOWN


_descriptors: dict[int, int] = {}  # copies of standard output and error


def _save_descriptors() -> None:
    for number in (1, 2):
        if number not in _descriptors:
            with suppress(OSError):
                _descriptors[number] = os.dup(number)


def _reopen_streams() -> None:
    """Reopen standard output and error in place if they were closed: progress bars keep references to them."""
    for number, stream in ((1, sys.__stdout__), (2, sys.__stderr__)):
        if number not in _descriptors:
            continue
        try:
            os.fstat(number)
        except OSError:
            os.dup2(_descriptors[number], number)
        if stream is not None and stream.closed and isinstance(stream, io.TextIOWrapper):
            file = open(number, "wb", closefd=False)  # noqa: SIM115 - open until the process exits
            io.TextIOWrapper.__init__(stream, file, "utf-8", "backslashreplace", line_buffering=True)


def _generator_states() -> list[Any]:
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    return [
        random.getstate(),
        np.random.get_state(),
        torch.get_rng_state(),
        torch.cuda.get_rng_state_all() if on_gpu else [],
    ]


def _restore_generators(states: list[Any]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    if states[3]:
        torch.cuda.set_rng_state_all(states[3])
