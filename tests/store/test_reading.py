"""Shards are verified when they are read; at the start of a run they are not read."""

from pathlib import Path

import pyarrow as pa
import pytest

from rlhf_pl.store import files as store_files
from rlhf_pl.store.check import find_problems
from rlhf_pl.store.round_store import DamagedStoreError, Round, RoundStore
from rlhf_pl.utils import disk


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Round:
    monkeypatch.setattr(disk.os, "fsync", lambda descriptor: None)
    stored = RoundStore(tmp_path).round(0)
    stored.update(settings={})
    for stage in ("responses", "rewards", "pairs", "logps"):
        for number in range(3):
            stored.write_shard(stage, number, pa.table({"a": [number, 10 * number], "b": ["x", "y"]}))
        stored.complete(stage)
    stored.complete("training")
    return stored


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_columns_are_read_shard_by_shard(stored: Round) -> None:
    assert stored.read("responses", ["a"]).to_pydict() == {"a": [0, 0, 1, 10, 2, 20]}
    assert [table.column_names for table in stored.read_shards("responses", ["b"])] == [["b"]] * 3
    assert stored.read_shard("responses", 2, ["a"]).to_pydict() == {"a": [2, 20]}


def test_a_start_reads_no_shard_and_finds_missing_and_truncated_ones(
    stored: Round, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RoundStore(stored.run_dir)
    files = list(stored.shards("responses").values())
    flip(files[0])
    files[1].write_bytes(files[1].read_bytes()[:-1])
    files[2].unlink()
    with monkeypatch.context() as patch:
        patch.setattr(store_files, "read_shard_file", lambda file: pytest.fail(f"{file} is read"))
        assert [file for _, file in find_problems(store, checksums=False).damaged] == files[1:]
    assert [file for _, file in find_problems(store).damaged] == files


@pytest.mark.parametrize("columns", [None, ["a"]])
def test_a_change_inside_a_shard_is_found_when_it_is_read(stored: Round, columns: list[str] | None) -> None:
    assert not find_problems(RoundStore(stored.run_dir), checksums=False)
    file = stored.shards("rewards")[1]
    flip(file)
    assert not find_problems(RoundStore(stored.run_dir), checksums=False)
    with pytest.raises(DamagedStoreError, match=f"{file.name} is damaged.*--repair"):
        stored.read("rewards", columns)
    with pytest.raises(DamagedStoreError, match="damaged"):
        stored.read_shard("rewards", 1, columns)
    assert stored.read_shard("rewards", 0)["b"].to_pylist() == ["x", "y"]
