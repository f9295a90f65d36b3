"""Held-out rows are whole groups, selected by their keys only, in any order of the rows."""

import hashlib

import pytest

from rlhf_pl.data.held_out import check_held_out, default_held_out, hold_out
from rlhf_pl.utils.errors import InputError

ROWS = [f"p{i}" for i in range(50)]


def no_source(source: str, option: str) -> list[str]:
    raise AssertionError("a source was loaded")


def split(rows: list[str], wanted: float, seed: int | None = None, least: int = 0) -> tuple[list[str], list[str]]:
    """Rows `a/1` and `a/2` have the key `a`."""
    return hold_out(rows, wanted, "data.val_rows", no_source, lambda row: row.split("/")[0], seed, least)


def test_held_out_rows_depend_on_their_keys_only() -> None:
    train, val = split(ROWS, 10)
    assert set(val) == set(sorted(ROWS, key=lambda row: hashlib.sha256(row.encode()).hexdigest())[:10])
    assert sorted([*train, *val]) == sorted(ROWS)
    assert (train, val) == ([r for r in ROWS if r in train], [r for r in ROWS if r in val])
    assert split(ROWS[::-1], 10) == (train[::-1], val[::-1])


def test_another_seed_holds_out_other_rows() -> None:
    _, val = split(ROWS, 10, seed=3)
    assert set(val) == set(sorted(ROWS, key=lambda row: hashlib.sha256(f"3:{row}".encode()).hexdigest())[:10])
    assert val != split(ROWS, 10, seed=4)[1]


def test_rows_with_one_key_are_on_one_side() -> None:
    rows = [f"p{i % 10}/{i}" for i in range(50)]
    train, val = split(rows, 8, seed=0)
    assert len(val) == 10  # two groups of five
    assert not {r.split("/")[0] for r in train} & {r.split("/")[0] for r in val}


@pytest.mark.parametrize(
    ("wanted", "least", "count"), [(0.2, 0, 10), (0.01, 0, 0), (0.001, 1, 1), (0.0, 1, 0), (3.0, 0, 3)]
)
def test_a_share_or_a_number_of_rows_is_held_out(wanted: float, least: int, count: int) -> None:
    assert len(split(ROWS, wanted, least=least)[1]) == count


def test_a_separate_source_is_loaded() -> None:
    train, val = hold_out(ROWS, "val.jsonl", "data.val_rows", lambda *given: [*given], str)
    assert (train, val) == (ROWS, ["val.jsonl", "data.val_rows"])


def test_at_least_one_row_is_left_to_train_on() -> None:
    with pytest.raises(InputError, match=r"`data\.val_rows` of 50 leaves none of 50 rows to train on"):
        split(ROWS, 50)


@pytest.mark.parametrize("wanted", [-1, 2.5, float("inf"), float("nan")])
def test_other_values_are_refused(wanted: float) -> None:
    with pytest.raises(InputError, match=r"`data\.val_rows` must be a share below 1 or a whole number, got"):
        check_held_out("data.val_rows", wanted)


@pytest.mark.parametrize(("prompts", "count"), [(1, 0), (4, 0), (5, 1), (40, 8), (319, 63), (1000, 64)])
def test_a_fifth_of_the_prompts_and_at_most_64_are_held_out_by_default(prompts: int, count: int) -> None:
    assert default_held_out(prompts) == count
