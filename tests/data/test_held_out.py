"""Which rows are held out: whole groups, by their keys alone, whatever the order of the rows."""

import hashlib

import pytest

from rlhf_pl.data.held_out import check_held_out, hold_out
from rlhf_pl.utils.errors import InputError

ROWS = [f"p{i}" for i in range(50)]


def no_source(source: str, option: str) -> list[str]:
    raise AssertionError("no source was given")


def held(rows: list[str], wanted: float, seed: int | None = None, least: int = 0) -> tuple[list[str], list[str]]:
    """Rows `a/1` and `a/2` have the key `a`."""
    return hold_out(rows, wanted, "data.val_rows", no_source, lambda row: row.split("/")[0], seed, least)


def test_held_out_rows_follow_from_their_keys_in_any_order() -> None:
    train, val = held(ROWS, 10)
    assert set(val) == set(sorted(ROWS, key=lambda row: hashlib.sha256(row.encode()).hexdigest())[:10])
    assert sorted([*train, *val]) == sorted(ROWS)
    assert (train, val) == ([r for r in ROWS if r in train], [r for r in ROWS if r in val])
    assert held(ROWS[::-1], 10) == (train[::-1], val[::-1])


def test_another_seed_holds_out_others() -> None:
    _, val = held(ROWS, 10, seed=3)
    assert set(val) == set(sorted(ROWS, key=lambda row: hashlib.sha256(f"3:{row}".encode()).hexdigest())[:10])
    assert val != held(ROWS, 10, seed=4)[1]


def test_rows_with_one_key_are_on_one_side() -> None:
    rows = [f"p{i % 10}/{i}" for i in range(50)]
    train, val = held(rows, 8, seed=0)
    assert len(val) == 10  # two whole groups of five
    assert not {r.split("/")[0] for r in train} & {r.split("/")[0] for r in val}


@pytest.mark.parametrize(
    ("wanted", "least", "count"), [(0.2, 0, 10), (0.01, 0, 0), (0.001, 1, 1), (0.0, 1, 0), (3.0, 0, 3)]
)
def test_a_share_or_a_number(wanted: float, least: int, count: int) -> None:
    assert len(held(ROWS, wanted, least=least)[1]) == count


def test_a_source_of_its_own_is_read() -> None:
    train, val = hold_out(ROWS, "val.jsonl", "data.val_rows", lambda *given: [*given], str)
    assert (train, val) == (ROWS, ["val.jsonl", "data.val_rows"])


def test_a_row_must_be_left_to_train_on() -> None:
    with pytest.raises(InputError, match=r"`data\.val_rows` of 50 leaves none of 50 rows to train on"):
        held(ROWS, 50)


@pytest.mark.parametrize("wanted", [-1, 2.5, float("inf"), float("nan")])
def test_what_is_not_a_share_or_a_number_is_refused(wanted: float) -> None:
    with pytest.raises(InputError, match=r"`data\.val_rows` must be a share below 1 or a whole number, got"):
        check_held_out("data.val_rows", wanted)
