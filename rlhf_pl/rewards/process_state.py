"""What users' code may leave behind in the process, and is put back after each call."""

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


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


_SETTINGS: list[tuple[Callable[[], Any], Callable[[Any], object]]] = [
    (os.getcwd, os.chdir),
    (_umask, os.umask),
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


class KeptSettings:
    """Puts back after the block what users' code has set in the process: an `os.chdir` has no effect on the run.

    These are the working directory, the mask of new files, blocked signals, locale, limits, torch's switches and the
    standard streams. Takes 30 microseconds.
    """

    def __enter__(self) -> None:
        self._settings = [_read(get) for get, _ in _SETTINGS]
        self._streams = (sys.stdin, sys.stdout, sys.stderr)
        _keep_descriptors()

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        for (get, put), before in zip(_SETTINGS, self._settings, strict=True):
            if before is not _UNKNOWN and _read(get) != before:
                put(before)
        sys.stdin, sys.stdout, sys.stderr = self._streams
        _mend_streams()


class KeptProcess:
    """Gives users' code random numbers of its own in the block, and puts signal handlers and timers back after it.

    Only in the main thread: in another one it would take them from the run, which goes on meanwhile.
    """

    def __enter__(self) -> None:
        self._in_main = threading.current_thread() is threading.main_thread()
        if self._in_main:
            self._handlers = [signal.getsignal(number) for number in _SIGNALS]
            self._ours = _generators()
            if _theirs:
                _set_generators(_theirs)

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if not self._in_main:
            return
        _theirs[:] = _generators()
        _set_generators(self._ours)
        for timer in (signal.ITIMER_VIRTUAL, signal.ITIMER_PROF):
            signal.setitimer(timer, 0)
        for number, handler in zip(_SIGNALS, self._handlers, strict=True):
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)


_theirs: list[Any] = []  # states of the generators where users' code left them


_UNKNOWN = object()


def _read(get: Callable[[], Any]) -> Any:
    try:
        return get()
    except (OSError, RuntimeError, ValueError):  # such as a working directory that was deleted
        return _UNKNOWN


_descriptors: dict[int, int] = {}  # copies of standard output and error


def _keep_descriptors() -> None:
    for number in (1, 2):
        if number not in _descriptors:
            with suppress(OSError):
                _descriptors[number] = os.dup(number)


def _mend_streams() -> None:
    """Open standard output and error again where they were closed, in place: progress bars hold on to them."""
    for number, stream in ((1, sys.__stdout__), (2, sys.__stderr__)):
        if number not in _descriptors:
            continue
        try:
            os.fstat(number)
        except OSError:
            os.dup2(_descriptors[number], number)
        if stream is not None and stream.closed and isinstance(stream, io.TextIOWrapper):
            file = open(number, "wb", closefd=False)  # noqa: SIM115 - as long as the process lives
            io.TextIOWrapper.__init__(stream, file, "utf-8", "backslashreplace", line_buffering=True)


def _generators() -> list[Any]:
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    return [
        random.getstate(),
        np.random.get_state(),
        torch.get_rng_state(),
        torch.cuda.get_rng_state_all() if on_gpu else [],
    ]


def _set_generators(states: list[Any]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    if states[3]:
        torch.cuda.set_rng_state_all(states[3])
