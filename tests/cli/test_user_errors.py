"""Errors of the system, which are reported in one line with a remedy."""

import errno
import os
from pathlib import Path

import pytest

from rlhf_pl.__main__ import main
from rlhf_pl.cli.user_errors import find_user_error


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.EROFS, "run/x: Read-only file system. Make that file system writable"),
        (errno.EACCES, "run/x: Permission denied. Give this user the permission"),
        (errno.EIO, "run/x: Input/output error. The disk or its connection fails"),
        (errno.EISDIR, "run/x: Is a directory. A folder is in the place of a file"),
        (errno.EEXIST, "run/x: File exists. A file or a broken link is in"),
    ],
)
def test_errors_of_a_file_system_name_the_file(number: int, says: str) -> None:
    found = find_user_error(OSError(number, os.strerror(number), "run/x"))
    assert str(found).startswith(says)


def test_an_error_of_a_rename_names_the_target() -> None:
    found = find_user_error(OSError(errno.EISDIR, "Is a directory", "run/.x.tmp", None, "run/x"))
    assert str(found).startswith("run/x: ")


@pytest.mark.parametrize("text", ["(pid 12) is killed by signal: Killed. ", "(pid(s) 12, 13) exited unexpectedly"])
def test_the_error_of_a_killed_loader_process_names_its_option(text: str) -> None:
    found = find_user_error(RuntimeError(f"DataLoader worker {text}"))
    assert str(found).startswith(f"DataLoader worker {text.strip()}")
    assert "`data.num_workers`" in str(found)
    assert "to resume from the newest checkpoint" in str(found)
    assert find_user_error(RuntimeError("something else")) is None


@pytest.mark.parametrize(("selector", "option"), [("AllPairs", "max_pairs"), ("LengthMatched", "max_difference")])
def test_a_refused_option_of_a_selector_is_named(
    selector: str, option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = f"--model.policy x --data.prompts x --rollout.reward x.y --trainer.default_root_dir {tmp_path / 'run'}"
    wrong = f"--rollout.selector {selector} --rollout.selector.{option} -1"
    assert main(["fit", *given.split(), *wrong.split()]) == 1
    assert f"`rollout.selector.{option}` must be" in capsys.readouterr().err
