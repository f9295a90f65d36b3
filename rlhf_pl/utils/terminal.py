"""What reaches the terminal: no secrets, no escape sequences, and of a long message the beginning."""

import re
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from rlhf_pl.utils.secrets import learn_arguments, redact, redact_known

MAX_PRINTED = 2000  # characters of an error on the terminal
MAX_TRACEBACK = 100_000  # of one that was asked for
MAX_LOGGED = 64 * 2**20  # characters that a process writes to its log of long errors
LOG = "errors.log"
_LEAST_LOOKED_AT = 2**16

# control characters but line ends and tabs, what reverses the direction of writing, and halves of surrogate pairs
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

# what progress bars and colours need: those of libraries too
_DRAWING = re.compile(rf"(\r|\x1b\[(?:[\d;]*m|\d*[AK]|\?25[hl]))|{_UNPRINTABLE.pattern}")


class _Log:
    """Where the whole of long errors goes: into the run directory once there is one, else beside other temporary files.

    Attributes:
        run_dir: The run directory, which may not be there yet.
        written: Characters so far.
    """

    def __init__(self) -> None:
        self.run_dir: Path | None = None
        self.written = 0
        self._temporary: Path | None = None

    def add(self, text: str) -> Path | None:
        """The file that `text` is now in; None if there is no room for it."""
        self.written += len(text)
        if self.written > MAX_LOGGED:
            return None
        try:
            if self.run_dir is not None and self.run_dir.is_dir():
                file = self.run_dir / LOG
            else:
                self._temporary = self._temporary or Path(tempfile.mkdtemp(prefix="rlhf-pl-"))
                file = self._temporary / LOG
            with file.open("a", encoding="utf-8") as opened:
                opened.write(escape(text) + "\n\n")
        except OSError:
            return None
        return file


_log = _Log()
_tracebacks = False


def log_to(run_dir: str | Path) -> None:
    """Have the whole of long errors in this directory, once it is there."""
    _log.run_dir = Path(run_dir)


def escape(text: str) -> str:
    r"""A text with control characters, those that change the direction of writing included, written as `\x1b`."""
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text.replace("\r\n", "\n"))


def printable(text: str) -> str:
    """A text for the terminal."""
    return escape(redact_known(text))


def shortened(text: str, limit: int) -> str:
    """A text of at most `limit` characters; a longer one names the file that holds the whole of it."""
    if len(text) <= limit:
        return text
    note = f"… [{len(text):,} characters in all{_place(_log.add(text))}]"
    return text[: max(0, limit - len(note))] + note


def summary(text: object, limit: int) -> str:
    """What is stored of a text: without secrets, and as `shortened`.

    Of texts that the log has no room for, no more is looked at than the beginning: there may be many.
    """
    looked_at = str(text)[: max(_LEAST_LOOKED_AT, MAX_LOGGED - _log.written)]
    return shortened(redact(looked_at.encode("utf-8", "backslashreplace").decode()), limit)


def _place(file: Path | None) -> str:
    return f", in {file}" if file else ""


def print_error(message: object, prefix: str = "error: ") -> None:
    """An error on standard error."""
    print(shortened(prefix + escape(redact(message)), MAX_PRINTED), file=sys.stderr, flush=True)


def show_tracebacks(wanted: bool) -> None:
    """Whether wrong inputs are shown with their traceback from here on: `--traceback`."""
    global _tracebacks
    _tracebacks = wanted


def shows_tracebacks() -> bool:
    """Whether `--traceback` was given."""
    return _tracebacks


def print_wrong_input(error: BaseException, message: object = None) -> None:
    """A wrong input on standard error: one message, after the traceback if that is wanted.

    Args:
        error: What was raised.
        message: What is said of it; None for what it says itself.
    """
    if _tracebacks:
        print_traceback(error, MAX_TRACEBACK)
    print_error(error if message is None else message)


def print_traceback(error: BaseException, limit: int = MAX_PRINTED) -> None:
    """A bug on standard error: the message, after as many of the last calls as there is room for."""
    whole = escape(redact("".join(traceback.format_exception(error))))
    if len(whole) <= limit:
        print(whole, end="", file=sys.stderr, flush=True)
        return
    note = f"[{len(whole):,} characters in all{_place(_log.add(whole))}]"
    message = escape(redact("".join(traceback.format_exception_only(error)))).rstrip("\n")
    if len(message) > limit // 2:
        message = message[: limit // 2] + "…"
    calls = escape(redact("".join(traceback.format_tb(error.__traceback__))))
    room = limit - len(message) - len(note) - 50
    if len(calls) > room:
        calls = "  ...\n" + calls[-room:].partition("\n")[2]
    print(f"Traceback (most recent call last):\n{calls}{message}\n{note}", file=sys.stderr, flush=True)


class _Redacted:
    """A text stream that gets no secrets, and of escape sequences those of progress bars and colours only."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(_DRAWING.sub(lambda found: found[1] or ascii(found[0])[1:-1], redact_known(text)))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def guarded_terminal(arguments: list[str]) -> Iterator[None]:
    """In which a command runs: what it, libraries and rewards print is safe, and what ends it is shown as above."""
    learn_arguments(arguments)
    sys.excepthook = _on_exception
    threading.excepthook = _on_thread_exception
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Redacted(before[0]), _Redacted(before[1])
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _on_thread_exception(given: threading.ExceptHookArgs) -> None:
    if given.exc_value is not None and not isinstance(given.exc_value, SystemExit):
        print_traceback(given.exc_value)


def _on_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print_traceback(error)
