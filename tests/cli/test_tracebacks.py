"""User errors are separated from bugs by the calls in their tracebacks."""

import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import rlhf_pl
from rlhf_pl.__main__ import main
from rlhf_pl.cli.user_errors import as_user_error, find_user_error
from rlhf_pl.utils.errors import InputError

PACKAGE = Path(rlhf_pl.__file__).parent


def make_module(name: str, source: str, file: str) -> Any:
    """A module whose calls have this name and file."""
    module = ModuleType(name)
    exec(compile(source, file, "exec"), vars(module))
    return module


LIGHTNING = "def refuse(error):\n    raise error\n"
VIA = "def via(function, error):\n    function(error)\n"


def raise_in(error: Exception, *, by: str, through: tuple[str, str] | None = None) -> Exception:
    """Raise an error in the module `by`, called by the module `through` if given, and catch it."""
    refuse = make_module(by, LIGHTNING, f"/site-packages/{by}.py").refuse
    via = (lambda refuse, error: refuse(error)) if through is None else make_module(through[0], VIA, through[1]).via
    with pytest.raises(type(error)) as caught:
        via(refuse, error)
    trace = caught.tb
    while trace is not None and trace.tb_frame.f_globals["__name__"] == __name__:
        trace = trace.tb_next
    return error.with_traceback(trace)


OURS = ("rlhf_pl.data.anything", str(PACKAGE / "anything.py"))
OWN_FILE = ("rlhf_pl.utils.by_path.mine_00", "/home/me/mine.py")  # a user's file that is given by its path


@pytest.mark.parametrize("error", [ValueError("x"), TypeError("x"), MisconfigurationException("x")])
def test_an_error_raised_by_lightning_alone_is_a_user_error(error: Exception) -> None:
    assert isinstance(find_user_error(raise_in(error, by="lightning.pytorch.trainer")), InputError)
    through = ("rlhf_pl.cli.fit", str(PACKAGE / "cli.py"))
    assert isinstance(find_user_error(raise_in(error, by="lightning.pytorch.trainer", through=through)), InputError)


@pytest.mark.parametrize("through", [("mine", "/home/me/mine.py"), OWN_FILE, ("installed", "/site-packages/i.py")])
def test_an_error_of_lightning_in_users_code_is_a_bug(through: tuple[str, str]) -> None:
    for error in (ValueError("x"), MisconfigurationException("x")):
        assert find_user_error(raise_in(error, by="lightning.pytorch.core", through=through)) is None


def test_of_calls_from_this_package_only_misconfigurations_are_user_errors() -> None:
    assert find_user_error(raise_in(ValueError("x"), by="lightning.pytorch.core", through=OURS)) is None
    error = raise_in(MisconfigurationException("x"), by="lightning.pytorch.core", through=OURS)
    assert isinstance(find_user_error(error), InputError)


def test_a_bug_of_lightning_or_torch_is_a_bug() -> None:
    assert find_user_error(raise_in(KeyError("x"), by="lightning.pytorch.core")) is None
    assert find_user_error(raise_in(ValueError("x"), by="torch.nn")) is None


def test_an_error_in_the_handling_of_another_counts_for_itself() -> None:
    bug = KeyError("missing")
    bug.__context__ = InputError("wrong")
    assert find_user_error(bug) is None
    with pytest.raises(RuntimeError) as chained:
        raise RuntimeError from InputError("wrong")
    assert str(find_user_error(chained.value)) == "wrong"


class Picky:
    def __init__(self, how: str) -> None:
        if how == "value":
            raise ValueError("size must be even")
        if how == "file":
            os.stat("/no/such/file")
        {}[how]


@pytest.mark.parametrize(("how", "says"), [("value", "ValueError: size must be even"), ("file", "/no/such/file")])
def test_a_constructor_may_refuse_a_value(how: str, says: str) -> None:
    with pytest.raises(InputError, match=f"can't be built: .*{says}"), as_user_error("This config can't be built"):
        Picky(how)


def test_other_errors_of_constructors_are_bugs() -> None:
    with pytest.raises(KeyError), as_user_error("This config can't be built"):
        Picky("missing")


CALLBACK = """
import lightning as L
class Broken(L.Callback):
    def on_train_start(self, trainer, pl_module):
        {}["missing"]
class LogsWrongly(L.Callback):
    def on_train_start(self, trainer, pl_module):
        pl_module.log("x", object())
"""


@pytest.fixture
def sft(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A short run."""
    (tmp_path / "guest_callbacks.py").write_text(CALLBACK)
    rows = [{"prompt": f"What is {i}?", "response": f"It is {i}."} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return [
        *("fit", "--model", "SFTModule", "--model.policy", str(llama), "--data", "SFTDataModule"),
        *("--data.conversations", "rows.jsonl", "--data.val_conversations", "0", "--data.max_tokens", "64"),
        *("--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
        *("--trainer.default_root_dir", "run"),
    ]


def test_a_bug_in_a_callback_is_raised(sft: list[str]) -> None:
    with pytest.raises(KeyError, match="missing"):
        main([*sft, "--trainer.callbacks", "guest_callbacks.Broken"])
    with pytest.raises(Exception, match="log") as error:
        main([*sft, "--trainer.callbacks", "guest_callbacks.LogsWrongly"])
    assert not isinstance(error.value, InputError)


def test_an_option_shows_the_traceback_of_an_error_of_lightning(
    sft: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = [*sft, "--trainer.gradient_clip_algorithm", "nonsense"]
    assert main(wrong) == 1
    short = capsys.readouterr().err
    assert "Traceback" not in short
    assert short.count("error: ") == 1
    assert short.endswith("`--traceback` shows where it was raised.\n")
    for arguments in (["--traceback", *wrong], [*wrong, "--traceback"]):
        assert main(arguments) == 1
        long = capsys.readouterr().err
        assert "Traceback (most recent call last)" in long
        assert "lightning/pytorch/trainer" in long
        assert long.count("error: ") == 1
        assert short.splitlines()[0] == long.splitlines()[-1]


@pytest.mark.parametrize("command", ["fit", "plan", "score", "rounds"])
def test_every_command_has_the_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = {
        "fit": ["--model.policy", "/no/model", "--data.prompts", "x.jsonl"],
        "plan": ["--model.policy", "/no/model", "--data.prompts", "x.jsonl", "--rollout.reward", "ExactAnswer"],
        "score": ["--reward", "nowhere.score", "--data", "x.jsonl"],
        "rounds": ["/no/such/run"],
    }[command]
    assert main([command, *wrong]) == 1
    assert "Traceback" not in capsys.readouterr().err
    assert main(["--traceback", command, *wrong]) == 1
    assert "InputError" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert capsys.readouterr().out.count("--traceback") == 1


def test_the_help_names_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "--traceback" in capsys.readouterr().out
