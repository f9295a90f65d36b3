"""Which exceptions are mistakes of the user, to be told in one line, and which are bugs, to be shown whole."""

import errno
import os
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from rlhf_pl.distributed.ranks import RanksError
from rlhf_pl.rollout.weight_sync.self_check import StaleSamplerError
from rlhf_pl.utils.disk import full_disk_error
from rlhf_pl.utils.errors import InputError

_MISTAKES = (InputError, StaleSamplerError, RanksError, MisconfigurationException)

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
_PARSERS = ("argparse", "jsonargparse")  # which end the process after `--help` and `--print_config`


def find_user_error(error: BaseException | None) -> BaseException | None:
    """The user's mistake behind `error`, if it is one: jsonargparse wraps what a constructor raises."""
    while error is not None and not isinstance(error, _MISTAKES):
        if isinstance(error, OSError) and (full := full_disk_error(Path(error.filename or "."), error)):
            return full
        if isinstance(error, OSError) and error.errno in _REFUSED:
            return InputError(f"{_name(error)}: {error.strerror}. {_REFUSED[error.errno]}")
        if isinstance(error, RuntimeError) and _WORKER.match(str(error)):
            return InputError(
                f"{_in_a_line(error).partition(': ')[2].rstrip(' .')}. Loader processes (`data.num_workers`) are "
                "mostly killed where memory runs out: take fewer, or 0. The same command goes on from the "
                "newest checkpoint."
            )
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            return InputError(f"No file has so long a name: {str(error.filename)[:60]!r}... Correct that option.")
        if isinstance(error, RuntimeError) and _raised_by(error, "lightning.pytorch.callbacks"):
            return InputError(f"`trainer.callbacks`: {_in_a_line(error)}")
        if isinstance(error, ValueError | TypeError | OverflowError) and _raised_by(error, "lightning"):
            return InputError(f"The Trainer refuses this config: {_in_a_line(error)}")
        error = error.__cause__ or error.__context__
    return error


def _name(error: OSError) -> str:
    """The file that an error is about."""
    return str(error.filename2 or error.filename or "A file")


def early_exit(stop: SystemExit) -> str | None:
    """Where users' code ended the process as if all were well; None for an exit with an error, or of a parser's."""
    frames = [f for f, _ in traceback.walk_tb(stop.__traceback__) if f.f_globals.get("__name__") != "_sitebuiltins"]
    if stop.code or not frames or frames[-1].f_globals.get("__name__", "").partition(".")[0] in _PARSERS:
        return None
    return f"{frames[-1].f_code.co_filename}, line {frames[-1].f_lineno}"


def _raised_by(error: BaseException, package: str) -> bool:
    """Whether the line that raised is the package's own."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return bool(frames) and f"{frames[-1][0].f_globals.get('__name__', '')}.".startswith(f"{package}.")


@contextmanager
def as_user_error(what: str) -> Iterator[None]:
    """What goes wrong in the block is a mistake in the config, whichever library notices."""
    try:
        yield
    except Exception as error:
        if find_user_error(error) is not None or os.environ.get("RLHF_PL_VERBOSE") == "1":
            raise
        raise InputError(f"{what}: {_in_a_line(error)}") from error


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
