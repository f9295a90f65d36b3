"""Safe output on the terminal: no secrets, no escape sequences, and only the beginning of long messages."""

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

from rlhf_pl.utils.secrets import redact, redact_known, register_arguments

MAX_PRINTED = 2000  # characters of an error on the terminal
MAX_TRACEBACK = 100_000  # characters of a requested traceback
MAX_LOGGED = 64 * 2**20  # characters that a process writes to its log of long errors
LOG = "errors.log"
_MIN_EXAMINED = 2**16  # characters

# control characters except line ends and tabs, characters that reverse the writing direction, and lone surrogates
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

# escape sequences of progress bars and colours, also of libraries' ones
_PROGRESS = re.compile(rf"(\r|\x1b\[(?:[\d;]*m|\d*[AK]|\?25[hl]))|{_UNPRINTABLE.pattern}")


class _Log:
    """Stores the full text of long errors: in the run directory if it exists, else in a temporary folder.

    Attributes:
        run_dir: The run directory, which may not exist yet.
        written: Characters so far.
    """

    def __init__(self) -> None:
        self.run_dir: Path | None = None
        self.written = 0
        self._temporary: Path | None = None

    def add(self, text: str) -> Path | None:
        """Append `text` to the log and return the file; None if the log is full or can't be written."""
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
_has_tracebacks = False


def set_log_folder(run_dir: str | Path) -> None:
    """Store the full text of long errors in this directory, once it exists."""
    _log.run_dir = Path(run_dir)


def escape(text: str) -> str:
    r"""Write control characters, including those that change the writing direction, as `\x1b`."""
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text.replace("\r\n", "\n"))


def make_printable(text: str) -> str:
    """A text for the terminal: escaped, without secrets."""
    return escape(redact_known(text))


def shorten(text: str, limit: int) -> str:
    """Shorten a text to `limit` characters. If it is longer, its end names the file with the full text."""
    if len(text) <= limit:
        return text
    note = f"… [{len(text):,} characters in total{_describe_file(_log.add(text))}]"
    return text[: max(0, limit - len(note))] + note


def summarize(text: object, limit: int) -> str:
    """Shorten a text for storage and remove its secrets.

    Only the beginning of a text is examined if the log has no space for the rest: there may be many such texts.
    """
    examined = str(text)[: max(_MIN_EXAMINED, MAX_LOGGED - _log.written)]
    return shorten(redact(examined.encode("utf-8", "backslashreplace").decode()), limit)


def _describe_file(file: Path | None) -> str:
    return f", in {file}" if file else ""


def print_error(message: object, prefix: str = "error: ") -> None:
    """Print an error on standard error."""
    print(shorten(prefix + escape(redact(message)), MAX_PRINTED), file=sys.stderr, flush=True)


def show_tracebacks(wanted: bool) -> None:
    """Set whether wrong inputs are shown with their traceback (`--traceback`)."""
    global _has_tracebacks
    _has_tracebacks = wanted


def shows_tracebacks() -> bool:
    """Whether `--traceback` was given."""
    return _has_tracebacks


def print_wrong_input(error: BaseException, message: object = None) -> None:
    """Print a wrong input on standard error: one message, after the traceback if `--traceback` was given.

    Args:
        error: The exception that was raised.
        message: The message to print; None for that of `error`.
    """
    if _has_tracebacks:
        print_traceback(error, MAX_TRACEBACK)
    print_error(error if message is None else message)


def print_traceback(error: BaseException, limit: int = MAX_PRINTED) -> None:
    """Print a bug on standard error: the message, after as many of the last calls as `limit` allows."""
    whole = escape(redact("".join(traceback.format_exception(error))))
    if len(whole) <= limit:
        print(whole, end="", file=sys.stderr, flush=True)
        return
    note = f"[{len(whole):,} characters in total{_describe_file(_log.add(whole))}]"
    message = escape(redact("".join(traceback.format_exception_only(error)))).rstrip("\n")
    if len(message) > limit // 2:
        message = message[: limit // 2] + "…"
    calls = escape(redact("".join(traceback.format_tb(error.__traceback__))))
    room = limit - len(message) - len(note) - 50
    if len(calls) > room:
        calls = "  ...\n" + calls[-room:].partition("\n")[2]
    print(f"Traceback (most recent call last):\n{calls}{message}\n{note}", file=sys.stderr, flush=True)


class _RedactedStream:
    """A text stream that removes secrets and all escape sequences except those of progress bars and colours."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(_PROGRESS.sub(lambda found: found[1] or ascii(found[0])[1:-1], redact_known(text)))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def guarded_terminal(arguments: list[str]) -> Iterator[None]:
    """Run a command so that its output, also that of libraries and rewards, is safe, and its final error is short."""
    register_arguments(arguments)
    sys.excepthook = _on_exception
    threading.excepthook = _on_thread_exception
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _RedactedStream(before[0]), _RedactedStream(before[1])
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _on_thread_exception(given: threading.ExceptHookArgs) -> None:
    if given.exc_value is not None and not isinstance(given.exc_value, SystemExit):
        print_traceback(given.exc_value)


def _on_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print_traceback(error)
