"""Which exceptions are mistakes of the user, to be told in one line, and which are bugs, to be shown whole."""

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
from rlhf_pl.utils.errors import InputError

_MISTAKES = (InputError, StaleSamplerError, RanksError)

# what a file system refuses, and the way out
_REFUSED = {
    errno.EROFS: "Make that file system writable, or give another directory (--trainer.default_root_dir DIR).",
    errno.EACCES: "Give this user the right to it.",
    errno.EPERM: "Give this user the right to it.",
    errno.EFBIG: "Raise the limit of a file's size (`ulimit -f`), or give a file system that holds larger files.",
    errno.EIO: "The disk or its connection fails. What was written before is whole; the same command goes on from it.",
    errno.ESTALE: "The file server has lost it. What was written before is whole; the same command goes on from it.",
}
_REFUSED |= {
    errno.EISDIR: "A folder stands in the place of a file: move it away.",
    errno.ENOTDIR: "A file or a link to nothing stands in the place of a folder: move it away.",
    errno.EEXIST: "A file or a link to nothing stands in the place of a folder: move it away.",
    errno.ELOOP: "Links lead in a circle: remove them.",
}
_WORKER = re.compile(r"DataLoader worker \(pid")
_LIBRARIES = ("lightning", "lightning_utilities", "torch", "torchmetrics", "jsonargparse", "yaml", "docstring_parser")
_PACKAGE = os.path.dirname(os.path.abspath(rlhf_pl.__file__)) + os.sep
# the command line hands on what a user has written
_COMMAND = ("rlhf_pl.__main__.", "rlhf_pl.cli.")
_PARSERS = ("argparse", "jsonargparse")  # which end the process after `--help` and `--print_config`


class LibraryError(InputError):
    """What a library refuses in the user's words; `--traceback` shows where."""


def find_user_error(error: BaseException | None) -> BaseException | None:
    """The user's mistake behind `error`, if it is one; everything else is a bug, in this code or in a user's.

    A mistake is what a check of ours says (`InputError`), what the file system refuses, or what Lightning refuses of
    the config. Lightning raises the same exceptions where code uses it wrongly, so the calls decide: the line that
    raised must be Lightning's own, and no call between it and the command line is of a user's code. Nor is one of ours,
    but for MisconfigurationException: it may come from options that a run hands on to Lightning. An error that was
    raised while another one was handled counts for itself, unless a library has wrapped the other one.
    """
    while error is not None:
        if isinstance(error, _MISTAKES):
            return error
        if (found := _refused_by_system(error) or _refused_by_lightning(error)) is not None:
            return found
        error = _wrapped(error)
    return None


def _refused_by_system(error: BaseException) -> InputError | None:
    if isinstance(error, OSError) and (full := full_disk_error(Path(error.filename or "."), error)):
        return full
    if isinstance(error, OSError) and error.errno in _REFUSED:
        return InputError(f"{_name(error)}: {error.strerror}. {_REFUSED[error.errno]}")
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return InputError(f"No file has so long a name: {str(error.filename)[:60]!r}... Correct that option.")
    if isinstance(error, RuntimeError) and _WORKER.match(str(error)):
        return InputError(
            f"{_in_a_line(error).partition(': ')[2].rstrip(' .')}. Loader processes (`data.num_workers`) are "
            "mostly killed where memory runs out: take fewer, or 0. The same command goes on from the "
            "newest checkpoint."
        )
    return None


def _refused_by_lightning(error: BaseException) -> InputError | None:
    calls = _calls(error)
    if not calls or calls[-1].package != "lightning" or any(call.is_users for call in calls):
        return None
    if isinstance(error, MisconfigurationException):
        return LibraryError(str(error).strip())
    if any(call.is_ours for call in calls):
        return None
    if isinstance(error, RuntimeError) and calls[-1].module.startswith("lightning.pytorch.callbacks"):
        return LibraryError(f"`trainer.callbacks`: {_in_a_line(error)}")
    if isinstance(error, ValueError | TypeError | OverflowError):
        return LibraryError(f"The Trainer refuses this config: {_in_a_line(error)}")
    return None


def _wrapped(error: BaseException) -> BaseException | None:
    """The error that another one was raised from, or that a library was handling when it raised it."""
    calls = _calls(error)
    return error.__cause__ or (error.__context__ if calls and calls[-1].is_librarys else None)


@dataclass(frozen=True)
class _Call:
    """A call on the way to an error.

    Args:
        module: Its name.
        function: Its name.
        file: That the function stands in.
    """

    module: str
    function: str
    file: str

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]

    @property
    def is_librarys(self) -> bool:
        return self.package in _LIBRARIES or self.package in sys.stdlib_module_names

    @property
    def is_commands(self) -> bool:
        return f"{self.module}.".startswith((*_COMMAND, f"{__name__}."))

    @property
    def is_ours(self) -> bool:
        return not self.is_commands and self.file.startswith(_PACKAGE) and not self.is_librarys

    @property
    def is_users(self) -> bool:
        """Files that are named by their path are in no package of ours, whatever their modules are called."""
        return not (self.is_librarys or self.is_ours or self.is_commands)


def _calls(error: BaseException) -> list[_Call]:
    """From the one that caught an error to the one that raised it."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return [_Call(f.f_globals.get("__name__", ""), f.f_code.co_name, f.f_code.co_filename) for f in frames]


def _name(error: OSError) -> str:
    """The file that an error is about."""
    return str(error.filename2 or error.filename or "A file")


def early_exit(stop: SystemExit) -> str | None:
    """Where users' code ended the process as if all were well; None for an exit with an error, or of a parser's."""
    frames = [f for f, _ in traceback.walk_tb(stop.__traceback__) if f.f_globals.get("__name__") != "_sitebuiltins"]
    if stop.code or not frames or frames[-1].f_globals.get("__name__", "").partition(".")[0] in _PARSERS:
        return None
    return f"{frames[-1].f_code.co_filename}, line {frames[-1].f_lineno}"


@contextmanager
def as_user_error(what: str) -> Iterator[None]:
    """In which a config is read and its classes are made: what is refused of it is a mistake in the config.

    Libraries may refuse a value by any exception. A class that the config names, the user's own too, refuses one by a
    ValueError, an OSError or an ImportError that its constructor itself raises. Anything else is a bug.
    """
    try:
        yield
    except Exception as error:
        if find_user_error(error) is not None or not _refuses_values(error):
            raise
        raise LibraryError(f"{what}: {_in_a_line(error)}") from error


def _refuses_values(error: BaseException | None) -> bool:
    while error is not None:
        calls = _calls(error)
        raised = calls[-1] if calls else None
        of_library = raised is not None and raised.is_librarys and not any(c.is_users or c.is_ours for c in calls)
        constructor = raised is not None and raised.function in ("__init__", "__post_init__", "__new__")
        if not of_library and not (constructor and isinstance(error, ValueError | OSError | ImportError)):
            return False
        error = _wrapped(error)
    return True


def _in_a_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return _class_problem(lines) or f"{type(error).__name__}: {lines[0]}"


def _class_problem(lines: list[str]) -> str:
    """What a class said when it could not be made, which jsonargparse lists among what it is not either."""
    found = []
    for number, line in enumerate(lines):
        text = line.strip().removeprefix("- ")
        if text.startswith("Problem with given class_path") and number + 1 < len(lines):
            reason = lines[number + 1].strip()
            if not reason.startswith(("Does not validate", "Subtypes:", "Errors:")):
                found.append(f"{text} {reason}")
    if not found and lines[0].startswith("Does not validate"):
        after = [i + 1 for i, line in enumerate(lines[:-1]) if line.strip() == "Errors:"]
        reasons = [lines[i].strip().removeprefix("- ") for i in after]
        found = [reason for reason in reasons if not reason.startswith("Does not validate")][:1]
    return "; ".join(dict.fromkeys(found))
