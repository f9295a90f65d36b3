"""Separates user errors, which are reported in one line, from bugs, which are shown with a traceback."""

import errno
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch.utilities.exceptions import MisconfigurationException

import rlhf_pl
from rlhf_pl.distributed.ranks import RanksError
from rlhf_pl.rollout.weight_sync.self_check import StaleSamplerError
from rlhf_pl.utils.disk import full_disk_error
from rlhf_pl.utils.errors import InputError, describe_error

_USER_ERRORS = (InputError, StaleSamplerError, RanksError)

# errors of a file system, and their remedies
_REMEDIES = {
    errno.EROFS: "Make that file system writable, or give another directory (--trainer.default_root_dir DIR).",
    errno.EACCES: "Give this user the permission.",
    errno.EPERM: "Give this user the permission.",
    errno.EFBIG: "Raise the limit on file size (`ulimit -f`), or use a file system that allows larger files.",
    errno.EIO: "The disk or its connection fails. Earlier files are intact; run the same command again to resume.",
    errno.ESTALE: "The file server has lost it. Earlier files are intact; run the same command again to resume.",
}
_REMEDIES |= {
    errno.EISDIR: "A folder is in the place of a file: move it away.",
    errno.ENOTDIR: "A file or a broken link is in the place of a folder: move it away.",
    errno.EEXIST: "A file or a broken link is in the place of a folder: move it away.",
    errno.ELOOP: "Links form a cycle: remove them.",
}
_WORKER = re.compile(r"DataLoader worker \(pid")
_LIBRARIES = ("lightning", "lightning_utilities", "torch", "torchmetrics", "jsonargparse", "yaml", "docstring_parser")
_PACKAGE = os.path.dirname(os.path.abspath(rlhf_pl.__file__)) + os.sep
# modules that pass the user's values on to libraries
_COMMAND = ("rlhf_pl.__main__.", "rlhf_pl.cli.")
_PARSERS = ("argparse", "jsonargparse")  # they exit after `--help` and `--print_config`

_OTHER_ALTERNATIVE = re.compile("does not correspond to a subclass of|Expected a <class 'NoneType'>")


class LibraryError(InputError):
    """A library refuses the user's input. `--traceback` shows where."""


def find_user_error(error: BaseException | None) -> BaseException | None:
    """The user error behind `error`; None for a bug, in this package or in the user's code.

    A user error is an `InputError`, a failure of the file system, or a config that Lightning refuses. Lightning raises
    the same exceptions when code misuses it, so the traceback decides: Lightning itself must raise the error, with no
    call to the user's code between it and the command line. There must be no call to this package either, except for
    MisconfigurationException, which may be about options that a run passes to Lightning. An error raised during the
    handling of another one is judged by itself, unless a library has wrapped the other one.
    """
    while error is not None:
        if isinstance(error, _USER_ERRORS):
            return error
        if (found := _find_system_error(error) or _find_lightning_error(error)) is not None:
            return found
        error = _get_wrapped_error(error)
    return None


def _find_system_error(error: BaseException) -> InputError | None:
    if isinstance(error, OSError) and (full := full_disk_error(Path(error.filename or "."), error)):
        return full
    if isinstance(error, OSError) and error.errno in _REMEDIES:
        return InputError(f"{_get_file(error)}: {error.strerror}. {_REMEDIES[error.errno]}")
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return InputError(f"This file name is too long: {str(error.filename)[:60]!r}... Correct that option.")
    if isinstance(error, RuntimeError) and _WORKER.match(str(error)):
        return InputError(
            f"{_summarize(error).partition(': ')[2].rstrip(' .')}. Loader processes (`data.num_workers`) are usually "
            "killed when memory runs out: use fewer, or 0. Run the same command again to resume from the newest "
            "checkpoint."
        )
    return None


def _find_lightning_error(error: BaseException) -> InputError | None:
    calls = _get_calls(error)
    if not calls or calls[-1].package != "lightning" or any(call.is_user for call in calls):
        return None
    if isinstance(error, MisconfigurationException):
        return LibraryError(str(error).strip())
    if any(call.is_own for call in calls):
        return None
    if isinstance(error, RuntimeError) and calls[-1].module.startswith("lightning.pytorch.callbacks"):
        return LibraryError(f"`trainer.callbacks`: {_summarize(error)}")
    if isinstance(error, ValueError | TypeError | OverflowError):
        return LibraryError(f"The Trainer refuses this config: {_summarize(error)}")
    return None


def _get_wrapped_error(error: BaseException) -> BaseException | None:
    """The error that `error` was raised from, or that a library was handling when it raised `error`."""
    calls = _get_calls(error)
    return error.__cause__ or (error.__context__ if calls and calls[-1].is_library else None)


@dataclass(frozen=True)
class _Call:
    """A call in a traceback.

    Args:
        module: Name of the called function's module.
        function: Name of the function.
        file: File with the function.
    """

    module: str
    function: str
    file: str

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]

    @property
    def is_library(self) -> bool:
        return self.package in _LIBRARIES or self.package in sys.stdlib_module_names

    @property
    def is_command(self) -> bool:
        return f"{self.module}.".startswith((*_COMMAND, f"{__name__}."))

    @property
    def is_own(self) -> bool:
        return not self.is_command and self.file.startswith(_PACKAGE) and not self.is_library

    @property
    def is_user(self) -> bool:
        """Whether the function is the user's. Files that users name by path are, whatever their modules are called."""
        return not (self.is_library or self.is_own or self.is_command)


def _get_calls(error: BaseException) -> list[_Call]:
    """The calls of an error's traceback, from the one that caught it to the one that raised it."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return [_Call(f.f_globals.get("__name__", ""), f.f_code.co_name, f.f_code.co_filename) for f in frames]


def _get_file(error: OSError) -> str:
    """The file that an error is about."""
    return str(error.filename2 or error.filename or "A file")


def find_early_exit(stop: SystemExit) -> str | None:
    """File and line where users' code exited with code 0; None for an exit with an error, or by a parser."""
    frames = [f for f, _ in traceback.walk_tb(stop.__traceback__) if f.f_globals.get("__name__") != "_sitebuiltins"]
    if stop.code or not frames or frames[-1].f_globals.get("__name__", "").partition(".")[0] in _PARSERS:
        return None
    return f"{frames[-1].f_code.co_filename}, line {frames[-1].f_lineno}"


@contextmanager
def as_user_error(what: str) -> Iterator[None]:
    """Raise errors about the config's values as LibraryErrors, while the config is parsed and its classes are built.

    A library may refuse a value with any exception. A class that the config names, including the user's own, refuses a
    value with a ValueError, an OSError or an ImportError raised by its constructor itself. This package's classes
    also fail on null where an option needs a value. Anything else is a bug.

    Args:
        what: First words of the message.
    """
    try:
        yield
    except Exception as error:
        if find_user_error(error) is not None or not _refuses_values(error):
            raise
        raise LibraryError(f"{what}: {_summarize(error)}") from error


def _refuses_values(error: BaseException | None) -> bool:
    while error is not None:
        if not _refuses_value(error):
            return False
        error = _get_wrapped_error(error)
    return True


def _refuses_value(error: BaseException) -> bool:
    """Whether a library, a constructor, or a class of this package that was given null raised the error."""
    calls = _get_calls(error)
    if not calls:
        return False
    raised = calls[-1]
    if raised.is_library and not any(call.is_user or call.is_own for call in calls):
        return True
    if raised.is_own and "NoneType" in str(error):
        return True
    in_constructor = raised.function in ("__init__", "__post_init__", "__new__")
    return in_constructor and isinstance(error, ValueError | OSError | ImportError)


def _summarize(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return _class_problem(lines) or describe_error(error)


def _class_problem(lines: list[str]) -> str:
    """The message of the constructor that failed, from jsonargparse's list of reasons; empty if it has none."""
    found = []
    for number, line in enumerate(lines):
        text = line.strip().removeprefix("- ")
        if text.startswith("Problem with given class_path") and number + 1 < len(lines):
            reason = lines[number + 1].strip()
            if not reason.startswith(("Does not validate", "Subtypes:", "Errors:")):
                found.append(f"{text} {reason}")
    if not found and lines[0].startswith("Does not validate"):
        reasons = [line.strip()[2:] for line in lines if line.strip().startswith("- ")]
        reasons = [reason for reason in reasons if not reason.startswith("Does not validate")]
        # a class that is another alternative's, or a value that is not null, is no reason if there is another one
        found = ([reason for reason in reasons if not _OTHER_ALTERNATIVE.search(reason)] or reasons)[:1]
    return "; ".join(dict.fromkeys(found))
