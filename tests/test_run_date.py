"""Templates that tell the day: a run has one, also after midnight."""

from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_pl import run_date
from rlhf_pl.chat import encode_prompt
from rlhf_pl.errors import InputError
from rlhf_pl.rendering import Renderer
from tests.test_template import ASK, TOKENIZER, tokenizer


@pytest.fixture
def today(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the day that it is."""

    class Clock(datetime):
        day = 1

        @classmethod
        def now(cls, tz: Any = None) -> "Clock":
            return cls(2026, 3, cls.day, 23, 59)

    monkeypatch.setattr(run_date, "datetime", Clock)
    monkeypatch.setattr(run_date, "_date", None)
    monkeypatch.delenv("RLHF_PL_RUN_DATE", raising=False)
    yield lambda day: setattr(Clock, "day", day)
    monkeypatch.undo()


def text() -> str:
    return TOKENIZER.decode(encode_prompt(tokenizer("LLAMA"), [ASK]))


def keep(folder: Path) -> None:
    run_date.keep_run_date(SimpleNamespace(default_root_dir=str(folder), is_global_zero=True))  # type: ignore[arg-type]


def test_a_run_keeps_its_date(today: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_date.take_run_date(str(tmp_path / "a"))
    assert "Today Date: 01 Mar 2026" in text()
    keep(tmp_path / "a")
    today(2)
    assert "01 Mar 2026" in text()
    monkeypatch.delenv("RLHF_PL_RUN_DATE")  # another process
    run_date.take_run_date(str(tmp_path / "a"))
    assert "01 Mar 2026" in text()
    row = Renderer(tokenizer("LLAMA"), 1000)([ASK], "Yes")
    assert "01 Mar 2026" in TOKENIZER.decode(row.ids)
    run_date.take_run_date(str(tmp_path / "b"))
    assert "02 Mar 2026" in text()
    run_date.take_run_date()
    assert "02 Mar 2026" in text()


def test_the_processes_of_a_run_have_one_date(today: Any, tmp_path: Path) -> None:
    """Those that it starts get its environment; nothing is written before a run begins."""
    run_date.take_run_date(str(tmp_path))
    today(2)
    run_date.take_run_date(str(tmp_path))
    assert "01 Mar 2026" in text()
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_where_no_template_asks(today: Any, tmp_path: Path) -> None:
    run_date.take_run_date(str(tmp_path))
    encode_prompt(tokenizer("PLAIN"), [ASK])
    keep(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_damaged_date_is_refused(today: Any, tmp_path: Path) -> None:
    (tmp_path / "date.txt").write_text("yesterday")
    with pytest.raises(InputError, match=r"date.txt should hold when the run began"):
        run_date.take_run_date(str(tmp_path))
