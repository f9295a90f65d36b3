"""The journal of scores: an incomplete last line is dropped, every other change is refused."""

import json
from pathlib import Path

import pytest

from rlhf_pl.store.files import DamagedStoreError
from rlhf_pl.store.journal import Journal, is_whole_journal, truncate_journal
from rlhf_pl.store.round_store import RoundStore

INPUTS = ["00000-0123456789abcdef.parquet", "reward:1"]
CALLS = [
    [["result", 0.5, {"a": 1.0}, 0], ["failure", "timeout", "after 3 s"]],
    [["result", 1.25, {}, 2]],
    [["result", -3.0, {}, 0], ["result", 7.0, {}, 0]],
]
ALL = [entry for call in CALLS for entry in call]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    journal = Journal(tmp_path / "rounds/0000/rewards/_00000.journal", INPUTS)
    assert journal.read() == []
    for call in CALLS:
        journal.add(call)
    return journal.path


def read(file: Path) -> list:
    return Journal(file, INPUTS).read()


def test_stored_results_are_read_and_continued(file: Path) -> None:
    journal = Journal(file, INPUTS)
    assert journal.read() == ALL
    journal.add(CALLS[0])
    assert read(file) == [*ALL, *CALLS[0]]
    assert is_whole_journal(file)


def test_a_journal_of_other_responses_is_deleted(file: Path) -> None:
    assert Journal(file, ["others", "reward:1"]).read() == []
    assert not file.exists()


@pytest.mark.parametrize("size", range(1, 400, 7))
def test_an_incomplete_line_is_dropped_and_the_calls_before_it_are_kept(file: Path, size: int) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:-size])
    if size < len(content):
        whole = content[:-size].count(b"\n") - 1
        assert is_whole_journal(file)
        expected = [entry for call in CALLS[: max(0, whole)] for entry in call]
        journal = Journal(file, INPUTS)
        assert journal.read() == expected
        journal.add([["result", 9.0, {}, 0]])
        assert read(file) == [*expected, ["result", 9.0, {}, 0]]


def lines_of(file: Path) -> list[bytes]:
    return file.read_bytes().splitlines(keepends=True)


CHANGES = {
    "a digit": lambda ls: [ls[0], ls[1].replace(b"0.5", b"0.6"), *ls[2:]],
    "a digit of the last": lambda ls: [*ls[:3], ls[3].replace(b"7.0", b"8.0")],
    "NaN": lambda ls: [*ls[:2], ls[2].replace(b"1.25", b"NaN"), ls[3]],
    "repeated": lambda ls: [*ls[:2], ls[1], *ls[2:]],
    "the last repeated": lambda ls: [*ls, ls[-1]],
    "missing": lambda ls: [*ls[:2], ls[3]],
    "reordered": lambda ls: [*ls[:1], ls[2], ls[1], ls[3]],
    "header missing": lambda ls: ls[1:],
    "garbage between": lambda ls: [*ls[:2], b"\xff\xfe\x00\n", *ls[2:]],
    "garbage at the end": lambda ls: [*ls, b"nothing\n"],
    "blank line": lambda ls: [*ls[:2], b"\n", *ls[2:]],
    "all garbage": lambda ls: [b"\x00\xff\n", b"x"],
    "a missing checksum": lambda ls: [*ls[:2], ls[2].split(b" ", 1)[1], ls[3]],
    "nested": lambda ls: [b"[" * 100000 + b"\n"],
}
KEPT = {"a digit": 0, "a digit of the last": 2, "NaN": 1, "repeated": 1, "the last repeated": 3, "missing": 1,
        "reordered": 0, "garbage between": 1, "garbage at the end": 3, "blank line": 1,
        "a missing checksum": 1}  # fmt: skip


@pytest.mark.parametrize("change", list(CHANGES))
def test_any_other_change_is_refused_and_repaired_up_to_it(file: Path, change: str) -> None:
    file.write_bytes(b"".join(CHANGES[change](lines_of(file))))
    with pytest.raises(DamagedStoreError, match=r"_00000\.journal is damaged after .* --repair"):
        read(file)
    assert not is_whole_journal(file)
    stored = RoundStore(file.parents[3]).round(0)
    assert stored.find_damage() == [file]
    stored.drop(file)
    assert read(file) == [entry for call in CALLS[: KEPT.get(change, 0)] for entry in call]


def old_format(lines: list) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def test_a_journal_without_checksums_is_accepted_and_converted(file: Path) -> None:
    file.write_bytes(old_format([INPUTS, *CALLS[:2]]) + b'[["result", 1.')
    journal = Journal(file, INPUTS)
    assert journal.read() == [entry for call in CALLS[:2] for entry in call]
    journal.add(CALLS[2])
    assert read(file) == ALL
    assert not file.read_bytes().startswith(b"[")


@pytest.mark.parametrize(
    "line",
    ['[["result", NaN, {}, 0]]', '[["result", "1", {}, 0]]', '[["nonsense"]]', '[["result", 1.0]]', '{"a": 1}', "7",
     "x", '[["result", 1' + "0" * 400 + ", {}, 0]]"],
)  # fmt: skip
def test_lines_without_checksums_must_be_scores(file: Path, line: str) -> None:
    file.write_bytes(old_format([INPUTS, CALLS[0]]) + line.encode() + b"\n" + old_format([CALLS[1]]))
    with pytest.raises(DamagedStoreError, match="after 1 calls"):
        read(file)
    truncate_journal(file)
    assert read(file) == CALLS[0]


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_a_journal_that_is_not_a_file_is_damage(file: Path, kind: str) -> None:
    file.unlink()
    file.mkdir() if kind == "folder" else file.symlink_to("nowhere")
    stored = RoundStore(file.parents[3]).round(0)
    assert stored.find_damage() == [file]
    stored.drop(file)
    assert read(file) == []
