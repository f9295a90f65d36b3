"""Progress bars of a run: their counts, their notes, and that none stays open."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from rich.progress import Progress

from rlhf_pl.callbacks import RoundCheckpoint, RoundProgress, round_progress
from tests.callbacks.conftest import SmallRun

Again = Callable[..., Any]
BAR = re.compile(r"^✓ (?P<what>.{34}) \S+ (?P<done>\d+)/(?P<total>\d+) (?P<unit>\w*) \d:\d\d:\d\d ?(?P<note>.*)$")
OURS = ("loading the model", "training", "validating")


def bars(printed: str) -> list[tuple[str, str, str, str, str]]:
    """Description, done, total, unit and note of this callback's finished bars, in order."""
    found = [match for line in printed.splitlines() if (match := BAR.match(line))]
    rows = [tuple(text.strip() for text in match.group("what", "done", "total", "unit", "note")) for match in found]
    return [row for row in rows if row[0] in OURS]  # type: ignore[misc]


def test_every_phase_of_lightning_has_a_bar(run: SmallRun) -> None:
    """Bars count micro-batches of two pairs to the last one, and show the last update's loss."""
    losses = [value for _, value in run.log.of("train/loss")]
    last = [losses[run.updates[0] - 1], losses[-1]]
    expected = [("loading the model", "1", "1", "", "")]
    for index in range(2):
        pairs, held_out = run.store.round(index).info("pairs"), run.store.held_out(index).info("pairs")
        for what, count, note in (("training", pairs, f"loss {last[index]:.3f}"), ("validating", held_out, "")):
            batches = str(-(-count["pairs"] // 2))
            expected.append((what, batches, batches, "batches", note))
    assert bars(run.printed) == expected


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Progress]:
    """Bars that the callback opens."""
    everything: list[Progress] = []
    plain = round_progress.make_progress

    def make() -> Progress:
        everything.append(plain())
        return everything[-1]

    monkeypatch.setattr(round_progress, "make_progress", make)
    return everything


class Counts(L.Callback):
    """Records the bar's count after every micro-batch."""

    def __init__(self, made: list[Progress]) -> None:
        self.made, self.found = made, []  # type: ignore[var-annotated]

    def on_train_batch_end(self, *_: Any) -> None:
        (task,) = self.made[-1].tasks
        self.found.append((task.completed, task.total))


def test_bars_count_micro_batches_and_resume_their_count(
    run: SmallRun, again: Again, made: list[Progress], tmp_path: Path
) -> None:
    pairs = run.store.round(0).info("pairs")["pairs"]
    batches = -(-pairs // 2)
    first, second = Counts(made), Counts(made)
    options: dict[str, Any] = {"enable_progress_bar": True, "enable_checkpointing": True}
    again(RoundProgress(), first, RoundCheckpoint(), max_steps=1, **options)
    assert first.found == [(1, batches), (2, batches)]
    last = str(tmp_path / "run" / "checkpoints" / "last.ckpt")
    again(RoundProgress(), second, RoundCheckpoint(), ckpt_path=last, **options)
    assert second.found == [(done, batches) for done in range(3, batches + 1)]
    assert not any(bar.live.is_started for bar in made)


def test_an_error_closes_the_bar(again: Again, made: list[Progress]) -> None:
    class Fails(L.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            assert made[-1].live.is_started
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        again(RoundProgress(), Fails(), enable_progress_bar=True)
    assert not any(bar.live.is_started for bar in made)


def test_a_disabled_bar_shows_nothing(again: Again, made: list[Progress], capsys: pytest.CaptureFixture[str]) -> None:
    bar = RoundProgress()
    bar.disable()
    again(bar, enable_progress_bar=True)
    assert made == []
    assert bars(capsys.readouterr().out) == []
    bar.enable()
    again(bar, enable_progress_bar=True)
    assert [row[0] for row in bars(capsys.readouterr().out)][:2] == ["loading the model", "training"]
