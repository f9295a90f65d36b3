"""Errors of the system that are told in one line, with the way out."""

import errno
import os

import pytest

from rlhf_pl.cli.user_errors import find_user_error


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.EROFS, "run/x: Read-only file system. Make that file system writable"),
        (errno.EACCES, "run/x: Permission denied. Give this user the right"),
        (errno.EIO, "run/x: Input/output error. The disk or its connection fails"),
        (errno.EISDIR, "run/x: Is a directory. A folder stands in the place of a file"),
        (errno.EEXIST, "run/x: File exists. A file or a link to nothing stands"),
    ],
)
def test_what_a_file_system_refuses_is_told_with_the_file(number: int, says: str) -> None:
    found = find_user_error(OSError(number, os.strerror(number), "run/x"))
    assert str(found).startswith(says)


def test_of_a_rename_the_target_is_named() -> None:
    found = find_user_error(OSError(errno.EISDIR, "Is a directory", "run/.x.tmp", None, "run/x"))
    assert str(found).startswith("run/x: ")


@pytest.mark.parametrize("text", ["(pid 12) is killed by signal: Killed. ", "(pid(s) 12, 13) exited unexpectedly"])
def test_a_killed_loader_process_is_told_with_its_option(text: str) -> None:
    found = find_user_error(RuntimeError(f"DataLoader worker {text}"))
    assert str(found).startswith(f"DataLoader worker {text.strip()}")
    assert "`data.num_workers`" in str(found)
    assert "goes on from the newest checkpoint" in str(found)
    assert find_user_error(RuntimeError("something else")) is None
