"""Foreign files, damaged files and missing rounds in a round store."""

import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from rlhf_pl.checkpointing.checkpoints import RUN
from rlhf_pl.checkpointing.resume import find_resume_point
from rlhf_pl.rounds.repair import move_aside
from rlhf_pl.store.check import find_foreign_files, find_problems
from rlhf_pl.store.files import content_checksum
from rlhf_pl.store.round_store import DamagedStoreError, Round, RoundStore
from rlhf_pl.utils import disk
from rlhf_pl.utils.errors import InputError

SHARDS = {"responses": 3, "rewards": 3, "pairs": 1, "logps": 1}


def fill(stored: Round, salt: int, stages: int = 4, held_out: int = 2) -> None:
    """Write a round whose first `stages` stages are complete, with shards that depend on `salt`."""
    stored.update(settings={"responses": {"seed": salt}}, prompts={"held_out": held_out})
    for stage, count in list(SHARDS.items())[:stages]:
        for number in range(count):
            stored.write_shard(stage, number, pa.table({"a": [salt, number]}))
        stored.complete(stage)
    if stages == 4 and not stored.is_held_out:
        stored.complete("training")


def make_run(folder: Path, salt: int = 0) -> RoundStore:
    """Write two rounds that were trained on, and the three evaluations before and after them."""
    store = RoundStore(folder)
    for version in range(3):
        fill(store.held_out(version), salt + 10 + version, 2)
    for index in range(2):
        fill(store.round(index), salt + index)
    return store


@pytest.fixture(autouse=True)
def no_flushes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk.os, "fsync", lambda descriptor: None)


@pytest.fixture
def store(tmp_path: Path) -> RoundStore:
    return make_run(tmp_path / "run")


@pytest.fixture
def other(tmp_path: Path) -> RoundStore:
    return make_run(tmp_path / "other", salt=100)


def age(store: RoundStore) -> None:
    """Convert a store to that of a version that recorded neither run nor round."""
    (store.run_dir / "store.json").unlink()
    for stored in store.all_rounds():
        for name in ("manifest.json", ".manifest.copy.json"):
            content = json.loads((stored.path / name).read_text())
            for key in ("run", "round", "checksum"):
                del content[key]
            text = json.dumps({**content, "checksum": content_checksum(content)}, indent=2)
            (stored.path / name).write_text(text)


def contents(store: RoundStore) -> dict[str, list[int]]:
    return {
        f"{stored.name}/{stage}": stored.read(stage)["a"].to_pylist()
        for stored in store.all_rounds()
        for stage in SHARDS
        if stored.is_complete(stage)
    }


@pytest.mark.parametrize("old", [False, True])
def test_a_new_store_has_no_problems_and_no_notes(store: RoundStore, old: bool) -> None:
    before = contents(store)
    if old:
        age(store)
    assert not find_problems(store)
    assert not list(store.run_dir.rglob("*.shard"))
    store.clean_up()
    assert not find_problems(store)
    assert contents(store) == before
    assert {stored.manifest["run"] for stored in store.all_rounds()} == {store.recorded_run}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("own_shard", ["existing", "missing"])
def test_a_foreign_shard_with_a_valid_checksum_is_named_and_not_read(
    store: RoundStore, other: RoundStore, old: bool, own_shard: str
) -> None:
    """It may sort before or after the own shard, which may be missing."""
    if old:
        age(store)
    stored, before = store.round(0), contents(store)
    real = stored.shards("responses")[1]
    sources = [other.round(0).shards(stage)[1] for stage in ("responses", "rewards")]
    sources += [other.round(1).shards("responses")[0], other.held_out(0).shards("responses")[1]]
    sources += [other.held_out(1).shards("responses")[2], other.held_out(2).shards("responses")[2]]
    foreign = sorted({str(shutil.copy(file, real.parent)) for file in sources})
    assert {Path(f).name < real.name for f in foreign} == {True, False}
    if own_shard == "missing":
        real.unlink()
        with pytest.raises(DamagedStoreError, match=f"{real.name} is damaged: it is missing"):
            stored.read("responses")
    else:
        assert contents(store) == before
    problems = find_problems(store)
    assert problems.foreign == sorted(map(Path, foreign))
    assert problems.damaged == ([] if own_shard == "existing" else [(problems.damaged[0][0], real)])
    with pytest.raises(DamagedStoreError, match=r"(?s)not of this run: .*parquet.*--repair"):
        problems.refuse()
    move_aside(store, problems.foreign)
    assert sorted(p.name for p in store.run_dir.glob("set_aside/rounds/0000/responses/*")) == sorted(
        Path(f).name for f in foreign
    )
    if own_shard == "missing":
        stored.drop(real)
        stored.write_shard("responses", 1, pa.table({"a": [0, 1]}))
        stored.complete("responses")
        assert stored.shards("responses")[1] == real
    assert not find_problems(store)


FOREIGN = {
    "rounds/0000/responses/00007-0123456789abcdef.parquet": "x",
    "rounds/0000/responses/notes.txt": "x",
    "rounds/0000/responses/deep/x.parquet": "x",
    "rounds/0000/pairs/_00000.journal": "x",
    "rounds/0000/rewards/_00000.shard": "{}",
    "rounds/0000/README": "x",
    "rounds/0000/backup/responses/x.parquet": "x",
    "rounds/copy/manifest.json": "{}",
    "rounds/1/manifest.json": "{}",
    "rounds/00001/manifest.json": "{}",
    "heldout/0000.bak/manifest.json": "{}",
}


@pytest.mark.parametrize("path", list(FOREIGN))
def test_any_other_file_is_named_and_moved_aside(store: RoundStore, path: str) -> None:
    before = contents(store)
    file = store.run_dir / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(FOREIGN[path])
    problems = find_problems(store)
    assert len(problems.foreign) == 1
    assert file.is_relative_to(problems.foreign[0])
    assert not problems.damaged
    assert not problems.missing
    move_aside(store, problems.foreign)
    assert (store.run_dir / "set_aside" / path).read_text() == FOREIGN[path]
    assert not find_problems(store)
    assert contents(store) == before


@pytest.mark.parametrize(
    "name",
    [".DS_Store", ".nfs000012", "00000-0123456789abcdef.parquet~", ".00000-0123456789abcdef.parquet.tmp", "Thumbs.db"],
)
def test_hidden_files_and_backups_are_ignored(store: RoundStore, name: str) -> None:
    for folder in ("rounds", "rounds/0000", "rounds/0000/responses"):
        (store.run_dir / folder / name).write_text("x")
    before = contents(store)
    assert not find_problems(store)
    assert contents(store) == before


@pytest.mark.parametrize("make", [lambda file: file.symlink_to("nowhere"), Path.mkdir, os.mkfifo])
def test_a_link_to_a_valid_shard_is_accepted_and_other_entries_are_damage(
    store: RoundStore, make: Callable[[Path], None]
) -> None:
    file = store.round(0).shards("responses")[1]
    shutil.move(file, store.run_dir / "elsewhere")
    file.symlink_to(store.run_dir / "elsewhere")
    assert not find_problems(store)
    file.unlink()
    make(file)
    assert [bad for _, bad in find_problems(store).damaged] == [file]
    with pytest.raises(DamagedStoreError, match=file.name):
        store.round(0).read("responses")
    store.round(0).drop(file)
    assert not os.path.lexists(file)
    assert not store.round(0).is_complete("responses")
    assert list(store.round(0).shards("responses")) == [0, 2]


@pytest.mark.parametrize("of", ["another run", "another round", "an evaluation"])
def test_a_foreign_manifest_is_detected_and_replaced_by_the_copy(store: RoundStore, other: RoundStore, of: str) -> None:
    before, file = contents(store), store.round(1).path / "manifest.json"
    source = {"another run": other.round(1), "another round": store.round(0), "an evaluation": store.held_out(1)}[of]
    shutil.copy(source.path / "manifest.json", file)
    with pytest.raises(DamagedStoreError, match=r"manifest\.json belongs to"):
        _ = store.round(1).manifest
    problems = find_problems(store)
    assert ([bad for _, bad in problems.damaged], problems.foreign, problems.missing) == ([file], [], [])
    store.round(1).drop(file)
    assert not find_problems(store)
    assert contents(store) == before


@pytest.mark.parametrize("at", [1, 2, 7])
def test_a_round_of_another_run_is_foreign_as_a_whole(store: RoundStore, other: RoundStore, at: int) -> None:
    shutil.rmtree(store.round(at).path, ignore_errors=True)
    shutil.copytree(other.round(1).path, store.round(at).path)
    problems = find_problems(store)
    assert problems.foreign == [store.round(at).path]
    assert not problems.damaged
    assert [stored.name for stored in find_problems(store, rounds_done=2).missing] == (
        ["rounds/0001"] if at == 1 else []
    )


def test_a_round_after_a_missing_round_is_foreign(store: RoundStore) -> None:
    shutil.copytree(store.round(1).path, store.round(7).path)
    shutil.copytree(store.held_out(1).path, store.held_out(9).path)
    age(store)  # nothing records the run
    assert find_problems(store, rounds_done=2).foreign == [store.held_out(9).path, store.round(7).path]


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    ("deleted", "missing"),
    [
        ("rounds/0000", ["rounds/0000"]),
        ("heldout/0000", ["heldout/0000"]),
        ("heldout", ["heldout/0000", "heldout/0001"]),
        ("rounds", ["rounds/0000", "rounds/0001"]),
        ("rounds/0001", ["rounds/0001"]),
    ],
)
def test_missing_rounds_are_named(store: RoundStore, deleted: str, missing: list[str], old: bool) -> None:
    if old:
        age(store)
    shutil.rmtree(store.run_dir / deleted)
    problems = find_problems(store, rounds_done=2)
    assert [stored.name for stored in problems.missing] == missing
    assert not problems.foreign
    for stored in problems.missing:
        store.give_up(stored)
    assert not find_problems(store, rounds_done=2)


def test_evaluations_are_not_missing_without_held_out_prompts(tmp_path: Path) -> None:
    store = RoundStore(tmp_path)
    fill(store.round(0), 0, held_out=0)
    assert not find_problems(store, rounds_done=1)


@pytest.mark.parametrize("text", [None, "", "{", '{"run": "x"}', "\x00"])
def test_the_store_identifies_its_run_without_its_file(store: RoundStore, other: RoundStore, text: str | None) -> None:
    run, file = store.recorded_run, store.run_dir / "store.json"
    file.unlink() if text is None else file.write_text(text)
    assert not find_problems(store)
    shutil.copytree(other.round(1).path, store.round(2).path)
    assert find_problems(store).foreign == [store.round(2).path]
    shutil.rmtree(store.round(2).path)
    fill(store.round(2), 2)
    assert store.recorded_run == run


def test_a_store_file_of_another_run_is_foreign(store: RoundStore, other: RoundStore) -> None:
    """All rounds record their own run: they are kept, and so is their run."""
    run = store.run
    shutil.copy(other.run_dir / "store.json", store.run_dir / "store.json")
    problems = find_problems(store, 2)
    assert problems.lines() == [f"not of this run: {store.run_dir / 'store.json'}"]
    move_aside(store, problems.foreign)
    assert not find_problems(store, 2)
    assert store.identify() == store.recorded_run == run


def test_a_checkpoint_of_another_run_is_refused(store: RoundStore, other: RoundStore) -> None:
    batches = {"is_last_batch": False}
    loop = {"epoch_progress": {"current": {"started": 2, "processed": 1}}, "epoch_loop.batch_progress": batches}
    checkpoint = {"global_step": 7, "loops": {"fit_loop": loop}}
    folder = store.run_dir / "checkpoints"
    folder.mkdir()
    file = folder / "update-00000007.ckpt"
    for content in ({}, {RUN: None}, {RUN: store.run}):
        torch.save(checkpoint | content, file)
        assert find_resume_point(str(store.run_dir), None, 2, False).checkpoint == file
    torch.save(checkpoint | {RUN: other.run}, folder / "update-00000003.ckpt")
    with pytest.raises(InputError, match=r"update-00000003\.ckpt belongs to another run .*--ckpt_path FILE"):
        find_resume_point(str(store.run_dir), None, 2, False)


def test_a_kill_at_any_moment_of_a_stage_loses_nothing_and_needs_no_repair(tmp_path: Path) -> None:
    """Killed before each flush and rename: every renamed shard is kept, and no file is foreign."""
    shard_counts = []
    for step in range(1, 40):
        store = RoundStore(tmp_path / str(step))
        child = os.fork()
        if child == 0:
            steps = iter(range(1, 100))

            def die(function: Callable[..., None], steps=steps, step=step) -> Callable[..., None]:
                return lambda *args: os._exit(9) if next(steps) == step else function(*args)

            disk.os.fsync, disk.os.replace = die(os.fsync), die(os.replace)
            disk.sync_folder = lambda folder: None
            fill(store.round(0), 1, stages=1)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        stored = store.round(0)
        existing = list((stored.path / "responses").glob("[0-9]*.parquet"))
        assert sorted(stored.shards("responses").values()) == sorted(existing)
        assert not find_problems(store)
        store.clean_up()
        before = {file: file.stat().st_mtime_ns for file in existing}
        resume_stage(stored)
        assert {file: file.stat().st_mtime_ns for file in existing} == before
        assert stored.read("responses")["a"].to_pylist() == [1, 0, 1, 1, 1, 2]
        assert not find_problems(store)
        others = [p.name for p in tmp_path.rglob(f"{step}/rounds/**/*") if p.is_file() and p.suffix != ".parquet"]
        assert sorted(others) == [".manifest.copy.json", "manifest.json"]
        if code == 0:
            break
        shard_counts.append(len(existing))
    assert code == 0
    assert set(shard_counts) == {0, 1, 2, 3}


def resume_stage(stored: Round) -> None:
    """Write the missing shards, as a stage does."""
    if not stored.manifest.get("settings"):
        stored.update(settings={})
    for number in set(range(3)) - set(stored.shards("responses")):
        stored.write_shard("responses", number, pa.table({"a": [1, number]}))
    stored.complete("responses")


def test_a_shard_survives_a_kill_before_it_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = RoundStore(tmp_path).round(0)
    stored.update(settings={})
    stored.write_shard("rewards", 0, pa.table({"a": [1]}))
    real = disk.os.replace

    def fail(source: Path, target: Path) -> None:
        if Path(target).suffix == ".parquet":
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(disk.os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        stored.write_shard("rewards", 0, pa.table({"a": [2]}))
    assert stored.read_shard("rewards", 0)["a"].to_pylist() == [1]
    assert not find_foreign_files(stored, RoundStore(stored.run_dir).run)
    monkeypatch.undo()
    stored.write_shard("rewards", 0, pa.table({"a": [2]}))
    assert stored.read_shard("rewards", 0)["a"].to_pylist() == [2]
    assert len(list((stored.path / "rewards").glob("*.parquet"))) == 1


def test_a_shard_of_an_incomplete_stage_requires_a_note_of_its_round(store: RoundStore, other: RoundStore) -> None:
    """The stage folder of another run, notes included, is copied into an incomplete one."""
    mine, theirs = store.round(2), other.round(2)
    for stored, salt, numbers in ((mine, 1, [0]), (theirs, 2, [0, 1])):
        stored.update(settings={"responses": {"seed": salt}})
        for number in numbers:
            stored.write_shard("responses", number, pa.table({"a": [salt, number]}))
    for file in (theirs.path / "responses").iterdir():
        if not (mine.path / "responses" / file.name).exists():
            shutil.copy(file, mine.path / "responses")
    assert list(mine.shards("responses")) == [0]
    foreign = {path.name for path in find_problems(store).foreign}
    assert foreign == {file.name for file in theirs.shards("responses").values()} | {"_00001.shard"}


def test_an_incomplete_stage_of_older_versions_rejects_two_shards_with_one_number(store: RoundStore) -> None:
    stored = store.round(2)
    stored.update(settings={})
    for number in range(2):
        stored.write_shard("responses", number, pa.table({"a": [number]}))
    for note in stored.path.rglob("*.shard"):
        note.unlink()
    age(store)
    assert list(stored.shards("responses")) == [0, 1]
    shutil.copy(store.round(0).shards("responses")[1], stored.path / "responses")
    assert list(stored.shards("responses")) == [0]
    assert len(find_problems(store).foreign) == 2
    store.clean_up()
    assert list(stored.shards("responses")) == [0]
    assert len(find_problems(store).foreign) == 2


def test_a_stored_run_of_an_older_version_is_read_unchanged(tmp_path: Path) -> None:
    """Two rounds of 12 prompts with 3 responses each, by a version whose manifests recorded neither run nor round."""
    with tarfile.open(Path(__file__).with_name("store_without_notes.tar.gz")) as archive:
        archive.extractall(tmp_path, filter="data")
    store = RoundStore(tmp_path)
    assert not find_problems(store, rounds_done=2)
    shards = {file: file.read_bytes() for file in tmp_path.rglob("*.parquet")}
    rewards = [store.round(index).read("rewards")["reward"].to_pylist() for index in range(2)]
    assert [sum(numbers) / 36 for numbers in rewards] == pytest.approx(
        [store.round(index).info("rewards")["mean"] for index in range(2)]
    )
    store.clean_up()
    assert not find_problems(store, rounds_done=2)
    assert shards == {file: file.read_bytes() for file in tmp_path.rglob("*.parquet")}
    foreign = shutil.copy(store.round(0).shards("responses")[1], store.round(1).path / "responses")
    assert find_problems(store, rounds_done=2).foreign == [Path(foreign)]
