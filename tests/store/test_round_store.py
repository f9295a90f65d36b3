import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf_pl.store.round_store import DamagedStoreError, Round, RoundStore
from rlhf_pl.utils import disk
from rlhf_pl.utils.errors import InputError


@pytest.fixture
def stored(tmp_path: Path) -> Round:
    made = RoundStore(tmp_path).round(0)
    made.update(settings={"responses": {"seed": 1}})
    for number in range(3):
        made.write_shard("responses", number, pa.table({"a": [number, number + 10]}))
    made.complete("responses", rows=6)
    return made


def test_shards_can_be_read_here_and_by_other_parquet_readers(stored: Round) -> None:
    assert stored.read("responses")["a"].to_pylist() == [0, 10, 1, 11, 2, 12]
    assert stored.info("responses")["rows"] == 6
    assert stored.find_damage() == []
    assert sorted(pq.read_table(stored.path / "responses")["a"].to_pylist()) == [0, 1, 2, 10, 11, 12]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "missing"])
def test_a_damaged_shard_is_found_and_named(stored: Round, damage: str) -> None:
    file = stored.shards("responses")[1]
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        file.write_bytes({"truncated": content[:-7], "flipped": flipped, "empty": b""}[damage])
        with pytest.raises(DamagedStoreError, match=file.name):
            stored.read("responses")
    assert stored.find_damage() == [file]
    stored.drop(file)
    assert not stored.is_complete("responses")
    assert list(stored.shards("responses")) == [0, 2]
    stored.write_shard("responses", 1, pa.table({"a": [1, 11]}))
    assert stored.shards("responses")[1].name == file.name  # the same content, the same name
    assert stored.find_damage() == []


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"schema_version": 2, "stages": {}}', "\xff"])
def test_a_damaged_manifest_is_found_and_restored_from_its_copy(stored: Round, text: str) -> None:
    file = stored.path / "manifest.json"
    before = stored.manifest
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(DamagedStoreError, match=r"manifest\.json is damaged"):
        stored.is_complete("responses")
    assert stored.find_damage() == [file]
    stored.drop(file)
    assert stored.manifest == before


def test_an_edited_manifest_is_detected(stored: Round) -> None:
    file = stored.path / "manifest.json"
    file.write_text(file.read_text().replace('"rows": 6', '"rows": 7'))
    assert stored.find_damage() == [file]


def test_shards_without_a_manifest_are_damage(stored: Round) -> None:
    (stored.path / "manifest.json").unlink()
    assert stored.find_damage() == [stored.path / "manifest.json"]


def test_another_schema_version_is_refused_with_a_remedy(stored: Round) -> None:
    stored.update(schema_version=1)
    with pytest.raises(InputError, match=r"schema version 1.*default_root_dir"):
        _ = stored.manifest


def test_clear_deletes_a_stage_and_those_after_it(stored: Round) -> None:
    for stage in ("rewards", "pairs", "logps"):
        stored.write_shard(stage, 0, pa.table({"a": [1]}))
        stored.complete(stage)
    stored.complete("training", loss=1.0)
    stored.clear("training")
    assert list(stored.manifest["stages"]) == ["responses", "rewards", "pairs", "logps"]
    stored.clear("pairs")
    assert list(stored.manifest["stages"]) == ["responses", "rewards"]
    assert stored.shards("pairs") == {}
    assert len(stored.shards("rewards")) == 1


def test_a_reopened_stage_may_be_interrupted_between_shards(stored: Round) -> None:
    """A shard with other content has another name: until the stage is complete again, the old one is not missing."""
    for number in range(2):
        stored.write_shard("rewards", number, pa.table({"reward": [1.0]}))
    stored.complete("rewards", failures={"timeout": 1})
    stored.reopen("rewards")
    stored.write_shard("rewards", 0, pa.table({"reward": [2.0]}))
    assert stored.find_damage() == []
    assert not stored.is_complete("rewards")
    assert stored.info("rewards")["failures"] == {"timeout": 1}
    stored.complete("rewards")
    assert stored.find_damage() == []


def test_a_failed_write_leaves_no_file(stored: Round, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    before = json.dumps(stored.manifest)
    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(InputError, match="The disk is full"):
        stored.write_shard("rewards", 0, pa.table({"a": [1]}))
    with pytest.raises(InputError, match="The disk is full"):
        stored.complete("rewards")
    monkeypatch.undo()
    assert stored.shards("rewards") == {}
    assert json.dumps(stored.manifest) == before
    assert not list(stored.path.rglob("*.tmp"))


@pytest.mark.parametrize("step", range(1, 5))
def test_a_manifest_can_be_written_again_after_a_kill_during_its_write(stored: Round, step: int) -> None:
    """The process is killed before each flush and rename of the manifest and its copy."""
    child = os.fork()
    if child == 0:
        steps = iter(range(1, 5))

        def die(function: Callable[..., None]) -> Callable[..., None]:
            return lambda *args: os._exit(9) if next(steps) == step else function(*args)

        disk.os.fsync, disk.os.replace = die(os.fsync), die(os.replace)
        disk.sync_folder = lambda folder: None
        stored.complete("rewards")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    if not stored.is_complete("rewards"):
        stored.complete("rewards")
    assert not list(stored.path.rglob(".*.tmp"))
    assert (stored.path / ".manifest.copy.json").read_text() == (stored.path / "manifest.json").read_text()


@pytest.mark.parametrize("number", [None, 1])
def test_shards_are_found_while_another_thread_completes_their_stage(tmp_path: Path, number: int | None) -> None:
    class CompletedMeanwhile(Round):
        """Its stage completes after the first reading of the manifest, and so its notes are gone."""

        @property
        def manifest(self) -> dict[str, Any]:
            read = super().manifest
            writer = Round(self.path)
            if not writer.is_complete("responses"):
                writer.complete("responses", rows=4)
            return read

    writer = RoundStore(tmp_path).round(0)
    writer.update(settings={"responses": {"seed": 1}})
    for shard in range(2):
        writer.write_shard("responses", shard, pa.table({"a": [shard]}))
    reader = CompletedMeanwhile(writer.path)
    assert list(reader.shards("responses", number)) == ([0, 1] if number is None else [1])
