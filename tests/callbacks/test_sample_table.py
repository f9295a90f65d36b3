"""The table of held-out prompts with a response from every round, as a page and in the loggers."""

import html
import json
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from rlhf_pl.callbacks import SampleTable
from rlhf_pl.callbacks.sample_table import to_html, to_markdown
from rlhf_pl.utils.errors import InputError
from tests.callbacks.conftest import Log, SmallRun

Again = Callable[..., Any]


class Cells(HTMLParser):
    """Rows of a page's table, as a browser shows their text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self._inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self._inside = True
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.rows[-1][-1] += data


def cells_of(markdown: str) -> list[list[str]]:
    """Rows of a Markdown table, with line breaks and escaped characters restored."""
    lines = [line.strip("|").split("|") for line in markdown.split("\n")]
    assert lines.pop(1) == [" --- "] * len(lines[0])
    return [[html.unescape(cell[1:-1].replace("<br>", "\n")) for cell in line] for line in lines]


def expected(run: SmallRun, versions: int, prompts: int) -> list[list[str]]:
    """The expected table from the store: the first response of every version to the first prompts."""
    versions_rows = [run.rows("heldout", v) for v in range(versions)]
    ids = list(dict.fromkeys(row["prompt_id"] for row in versions_rows[0]))[:prompts]
    asked = {row["prompt_id"]: row["prompt"] for row in versions_rows[0]}
    table = [["prompt", "before", *(f"after round {v}" for v in range(1, versions))]]
    for prompt_id in ids:
        firsts = [next(r for r in rows if r["prompt_id"] == prompt_id) for rows in versions_rows]
        assert all(row["response_index"] == 0 for row in firsts)
        table.append(
            [
                json.loads(asked[prompt_id])[-1]["content"],
                *(f"{row['response'].strip()}\n[reward {row['reward']:.3f}]" for row in firsts),
            ]
        )
    return table


def test_the_page_has_every_version_of_the_first_prompts(run: SmallRun) -> None:
    page = (run.folder / "samples.html").read_bytes().decode()
    assert Cells(page).rows == expected(run, versions=3, prompts=3)
    assert not (run.folder / "samples.tmp").exists()


def test_loggers_get_the_table_after_every_round_at_its_last_update(run: SmallRun) -> None:
    steps = [run.updates[0] - 1, run.trainer.global_step - 1]
    assert [(tag, step) for tag, _, step in run.log.texts] == [("samples", steps[0]), ("samples", steps[1])]
    for versions, (_, text, _) in zip((2, 3), run.log.texts, strict=True):
        assert cells_of(text) == expected(run, versions, prompts=3)


class Tables(Log):
    """A logger of tables, like that of Weights & Biases."""

    experiment = None  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[tuple[str, list[str], list[list[str]], int]] = []

    def log_table(self, key: str, columns: list[str], data: list[list[str]], step: int) -> None:
        self.tables.append((key, columns, data, step))


def test_loggers_of_tables_get_columns_and_rows(run: SmallRun, again: Again) -> None:
    log = Tables()
    again(SampleTable(2), logger=log)
    header, *rows = expected(run, versions=2, prompts=2)
    assert log.tables == [("samples", header, rows, run.updates[0] - 1)]


def test_missing_versions_are_left_out(run: SmallRun, again: Again, tmp_path: Path) -> None:
    shutil.copytree(run.folder / "heldout" / "0001", tmp_path / "run" / "heldout" / "0001")
    again(SampleTable(4))
    header, *rows = Cells((tmp_path / "run" / "samples.html").read_bytes().decode()).rows
    assert header == ["prompt", "after round 1"]
    assert rows == [[row[0], row[2]] for row in expected(run, versions=2, prompts=4)[1:]]


@pytest.mark.parametrize("options", [{"max_steps": 1}, {"held_out": False}], ids=["stopped", "nothing held out"])
def test_without_an_evaluation_there_is_no_table(again: Again, tmp_path: Path, options: dict[str, Any]) -> None:
    again(SampleTable(2), logger=(log := Log()), **options)
    assert log.texts == []
    assert not (tmp_path / "run" / "samples.html").exists()


def test_zero_prompts_give_no_table(again: Again, tmp_path: Path) -> None:
    again(SampleTable(0), logger=(log := Log()))
    assert log.texts == []
    assert not (tmp_path / "run" / "samples.html").exists()
    with pytest.raises(InputError, match=r"`samples\.num_prompts` must be 0 or more, got -1"):
        SampleTable(-1)


def test_sample_pages_run_no_scripts_and_load_no_images() -> None:
    text = "<script>alert(1)</script> ![x](http://evil/i.png) [y](javascript:z) <img src=x onerror=y> a|b\nc"
    page = to_html(["prompt"], [[text]])
    assert "<script>" not in page
    assert "<img" not in page
    markdown = to_markdown(["prompt"], [[text]])
    assert "<script" not in markdown
    assert "<img" not in markdown
    assert "](" not in markdown
    assert markdown.splitlines()[2].count("|") == 2
    assert "<br>c" in markdown
