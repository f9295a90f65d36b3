"""Templates with the date: a run keeps its date after midnight."""

from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_pl.models.chat import encode_prompt
from rlhf_pl.models.rendering import Renderer
from rlhf_pl.utils import run_date
from rlhf_pl.utils.errors import InputError
from tests.models.test_chat_template import ASK, TOKENIZER, tokenizer


@pytest.fixture
def today(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that sets the current day."""

    class Clock(datetime):
        day = 1

        @classmethod
        def now(cls, tz: Any = None) -> "Clock":
            return cls(2026, 3, cls.day, 23, 59)

    monkeypatch.setattr(run_date, "datetime", Clock)
    monkeypatch.setattr(run_date, "_date", None)
    yield lambda day: setattr(Clock, "day", day)
    monkeypatch.undo()


def text() -> str:
    return TOKENIZER.decode(encode_prompt(tokenizer("LLAMA"), [ASK]))


def trainer(folder: Path, **changes: Any) -> Any:
    return SimpleNamespace(default_root_dir=str(folder), is_global_zero=True, world_size=1, **changes)


def test_a_run_keeps_its_date(today: Any, tmp_path: Path) -> None:
    run = trainer(tmp_path / "a")
    run_date.set_run_date(run)
    assert "Today Date: 01 Mar 2026" in text()
    run_date.save_run_date(run)
    today(2)
    assert "01 Mar 2026" in text()
    run_date.set_run_date(run)
    assert "01 Mar 2026" in text()
    row = Renderer(tokenizer("LLAMA"), 1000)([ASK], "Yes")
    assert "01 Mar 2026" in TOKENIZER.decode(row.ids)
    run_date.set_run_date(trainer(tmp_path / "b"))
    assert "02 Mar 2026" in text()
    run_date.set_run_date()
    assert "02 Mar 2026" in text()


def test_all_processes_of_a_run_use_the_date_of_rank_0(today: Any, tmp_path: Path) -> None:
    today(2)
    run = trainer(tmp_path, strategy=SimpleNamespace(broadcast=lambda text: "2026-03-01T23:59:59"))
    run.world_size = 2
    run_date.set_run_date(run)
    assert "01 Mar 2026" in text()
    assert not list(tmp_path.iterdir())  # nothing is written before a run begins


def test_nothing_is_written_if_no_template_uses_the_date(today: Any, tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run_date.set_run_date(run)
    encode_prompt(tokenizer("PLAIN"), [ASK])
    run_date.save_run_date(run)
    assert not list(tmp_path.iterdir())


def test_a_damaged_date_is_refused(today: Any, tmp_path: Path) -> None:
    (tmp_path / "date.txt").write_text("yesterday")
    with pytest.raises(InputError, match=r"date.txt must hold the time when the run began"):
        run_date.set_run_date(trainer(tmp_path))
