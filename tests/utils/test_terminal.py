"""Safe output on the terminal."""

import io
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from rlhf_pl.__main__ import main
from rlhf_pl.cli import rounds as inspect_rounds
from rlhf_pl.rewards import Failure
from rlhf_pl.store.round_store import RoundStore
from rlhf_pl.utils import secrets, terminal
from rlhf_pl.utils.console import SafeConsole, phase
from rlhf_pl.utils.secrets import register_secret
from rlhf_pl.utils.terminal import MAX_PRINTED, escape, print_error, print_traceback, shorten

HOSTILE = "\x1b]0;title\x07\x1b[2J[/bold][link=http://x]\x9b31m\u202edcba\u2066\ud800 :smile: [red]"
SHOWN = r"\x1b]0;title\x07\x1b[2J[/bold][link=http://x]\x9b31m\u202edcba\u2066\ud800 :smile: [red]"
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
KEY = "sk-live_0123456789abcdefXYZ"


@pytest.fixture(autouse=True)
def clean_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "_known", set())
    monkeypatch.setattr(terminal, "_log", terminal._Log())


def test_control_characters_are_escaped_except_line_ends() -> None:
    assert escape(HOSTILE) == SHOWN
    assert escape("a\tb\r\nc\nd\re\x85") == "a\tb\nc\nd\\re\\x85"
    assert escape("naïve 日本 👩‍👩‍👧 עברית") == "naïve 日本 👩‍👩‍👧 עברית"


@pytest.mark.parametrize(
    "make",
    [
        str,
        Text,
        lambda text: Text.assemble(("styled", "bold"), text),
        lambda text: Panel(Text(text), title=Text(text)),
        lambda text: _table(text),
        lambda text: Group(text, _table(text)),
    ],
    ids=["str", "text", "assembled", "panel", "table", "group"],
)
def test_the_console_prints_any_text_literally(make: Callable[[str], object]) -> None:
    register_secret(KEY)
    console = SafeConsole()
    console.file, console.width = io.StringIO(), 300
    console.print(make(HOSTILE + KEY), soft_wrap=True)
    shown = console.file.getvalue()
    assert SHOWN.replace(r"\x07", "") in shown.replace(r"\x07", "")  # rich leaves bells out by itself
    assert not CONTROLS.search(shown)
    assert KEY not in shown


def _table(text: str) -> Table:
    table = Table(text, title=text)
    table.add_row(text)
    return table


def test_progress_notes_are_not_markup(capsys: pytest.CaptureFixture[str]) -> None:
    with phase("[/x]", 2, "[/y]") as advance:
        advance(2, "[/z]\x1b[2J")
    out = capsys.readouterr().out
    assert "[/x]" in out
    assert "\x1b[2J" not in out


def test_a_long_error_is_truncated_and_stored_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    register_secret(KEY)
    print_error(f"\x1b[2J{'x' * 5_000_000}{KEY} the end")
    shown = capsys.readouterr().err
    assert len(shown) <= MAX_PRINTED + 1
    file = Path(re.search(r"characters in total, in (.*)\]$", shown.strip())[1])
    stored = file.read_text()
    assert stored.startswith(r"error: \x1b[2Jxxx")
    assert stored.strip().endswith("x<secret> the end")
    assert file.parent.stat().st_mode & 0o077 == 0  # no access for other users


def test_the_log_is_in_the_run_directory_once_that_exists(tmp_path: Path) -> None:
    run = tmp_path / "run"
    terminal.set_log_folder(run)
    assert str(run) not in shorten("x" * 200, 150)
    assert not run.exists()
    run.mkdir()
    assert f"in {run}/errors.log" in shorten("y" * 300, 250)
    assert (run / "errors.log").read_text().strip() == "y" * 300


def test_the_size_of_the_log_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "MAX_LOGGED", 1000)
    terminal.set_log_folder(tmp_path)
    details = [Failure("exception", "x" * 5000).detail for _ in range(3)]
    assert not (tmp_path / "errors.log").exists()
    assert all(len(detail) == 1000 and detail.endswith("… [5,000 characters in total]") for detail in details)


def test_a_log_that_cannot_be_written_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal.tempfile, "mkdtemp", lambda **_: (_ for _ in ()).throw(OSError("read-only")))
    assert shorten("x" * 100, 80).endswith("[100 characters in total]")


def test_a_bug_is_shown_with_its_last_calls_and_its_message(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    register_secret(KEY)
    terminal.set_log_folder(tmp_path)

    def deep(n: int) -> None:
        if n:
            deeper(n - 1)
        raise KeyError(f"\x1b[2J{KEY}" + "z" * 10_000)

    def deeper(n: int) -> None:
        deep(n)

    with pytest.raises(KeyError) as caught:
        deep(60)
    print_traceback(caught.value)
    shown = capsys.readouterr().err
    assert len(shown) <= MAX_PRINTED + 1
    assert shown.startswith("Traceback (most recent call last):\n  ...\n")
    assert "in deep" in shown
    assert "KeyError: '\\x1b[2J<secret>zzz" in shown
    assert f"in {tmp_path}/errors.log" in shown
    assert KEY not in (tmp_path / "errors.log").read_text()


def test_a_bug_in_a_command_is_shown_in_the_same_way(tmp_path: Path) -> None:
    """By Python's exception hook, with exit code 1. Texts that others print have no secrets."""
    script = (
        "import sys, os, logging\nfrom rlhf_pl import __main__ as m\n"
        "def bug(argv):\n"
        "    print('to you', os.environ['MY_API_KEY']); logging.error(os.environ['MY_API_KEY'])\n"
        "    raise ZeroDivisionError('\\x1b[2J' + os.environ['MY_API_KEY'] + 'x' * 3_000_000)\n"
        "m._run = bug\nsys.exit(m.main(['fit']))\n"
    )
    environment = os.environ | {"MY_API_KEY": KEY, "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert done.stdout == "to you <secret>\n"
    assert KEY not in done.stderr
    assert "\x1b" not in done.stderr
    assert len(done.stderr) < MAX_PRINTED + 100
    (log,) = tmp_path.rglob("errors.log")
    assert len(log.read_text()) > 3_000_000
    assert KEY not in log.read_text()


@pytest.mark.parametrize("prompt_id", ["[/bold]", "[red]x[/blue]", "\x1b[2J", "a\nb", "]", "[link=x]"])
def test_rounds_shows_samples_with_any_prompt_id(
    prompt_id: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = RoundStore(tmp_path).round(0)
    responses = {
        "prompt_id": [prompt_id],
        "response_index": [0],
        "prompt": ['[{"role": "user", "content": "\\u001b]0;x\\u0007[/b]"}]'],
        "response": [HOSTILE[:-10].replace("\ud800", "")],
        "finished": [True],
    }
    stored.write_shard("responses", 0, pa.table(responses))
    rewards = {"prompt_id": [prompt_id], "response_index": [0], "reward": [None], "failure": ["exception: [/i]\x1b[0m"]}
    stored.write_shard("rewards", 0, pa.table(rewards))
    stored.update(settings={"responses": {"sampler": "[/x]\x1b[2J http://me:pw@host"}}, warnings={"w": "[/y]\x1b[1m"})
    assert main(["rounds", str(tmp_path), "--round", "1", "--samples", "1"]) == 0
    assert main(["rounds", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert not CONTROLS.search(out)
    assert "me:pw" not in out
    assert r"\x1b]0;x[/b]" in out
    assert "exception: [/i]" in out


def test_an_unknown_command_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["\x1b[2J"]) == 2
    assert "\x1b" not in capsys.readouterr().err
    assert inspect_rounds.run(["/no/\x1b[2Jsuch"]) == 1
    assert "\x1b" not in capsys.readouterr().err


def test_failures_with_any_text_can_be_stored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failure = Failure("exception", "\ud800 \x00 ö" + "\udfff" * 5000)
    pa.array([failure.detail], pa.string())
    assert failure.detail.startswith("\\ud800 \x00 ö\\udfff")
    monkeypatch.setattr(terminal, "MAX_LOGGED", 0)
    started = time.monotonic()
    for _ in range(50):
        Failure("exception", "x" * 5_000_000)
    assert time.monotonic() - started < 2


def test_output_of_rewards_and_libraries_is_safe(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bar = "\r 50%|\x1b[32m████\x1b[0m|\x1b[A\x1b[2K\x1b[?25l"

    def chatty(argv: list[str]) -> int:
        print(f"{bar} \x1b]52;c;x\x07\x1b[2J\x1b[10;1H\u202e\ud800 {os.environ['MY_API_KEY']}")
        print("\x1bP", file=sys.stderr)
        return 0

    monkeypatch.setenv("MY_API_KEY", KEY)
    monkeypatch.setattr("rlhf_pl.__main__._run", chatty)
    assert main(["fit"]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{bar} \\x1b]52;c;x\\x07\\x1b[2J\\x1b[10;1H\\u202e\\ud800 <secret>\n"
    assert printed.err == "\\x1bP\n"
