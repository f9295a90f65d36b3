"""Files that are in a round store and are not its own, and what is gone from one."""

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
from rlhf_pl.store.check import find_problems, strangers_in
from rlhf_pl.store.files import content_checksum
from rlhf_pl.store.round_store import DamagedStoreError, Round, RoundStore
from rlhf_pl.utils import disk
from rlhf_pl.utils.errors import InputError

SHARDS = {"responses": 3, "rewards": 3, "pairs": 1, "logps": 1}


def fill(stored: Round, salt: int, stages: int = 4, held_out: int = 2) -> None:
    """A round whose first `stages` stages are complete; what is in its shards depends on `salt`."""
    stored.update(settings={"responses": {"seed": salt}}, prompts={"held_out": held_out})
    for stage, count in list(SHARDS.items())[:stages]:
        for number in range(count):
            stored.write_shard(stage, number, pa.table({"a": [salt, number]}))
        stored.complete(stage)
    if stages == 4 and not stored.is_held_out:
        stored.complete("training")


def make_run(folder: Path, salt: int = 0) -> RoundStore:
    """Two rounds that were trained on, and the three evaluations around them."""
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
    """Make of a store one of a version that noted neither run nor round."""
    (store.run_dir / "store.json").unlink()
    for stored in store.everything():
        for name in ("manifest.json", ".manifest.copy.json"):
            content = json.loads((stored.path / name).read_text())
            for key in ("run", "round", "checksum"):
                del content[key]
            text = json.dumps({**content, "checksum": content_checksum(content)}, indent=2)
            (stored.path / name).write_text(text)


def contents(store: RoundStore) -> dict[str, list[int]]:
    return {
        f"{stored.name}/{stage}": stored.read(stage)["a"].to_pylist()
        for stored in store.everything()
        for stage in SHARDS
        if stored.is_complete(stage)
    }


@pytest.mark.parametrize("old", [False, True])
def test_a_store_is_whole_and_its_notes_are_gone(store: RoundStore, old: bool) -> None:
    before = contents(store)
    if old:
        age(store)
    assert not find_problems(store)
    assert not list(store.run_dir.rglob("*.shard"))
    store.tidy()
    assert not find_problems(store)
    assert contents(store) == before
    assert {stored.manifest["run"] for stored in store.everything()} == {store.noted_run}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("real_is", ["there", "gone"])
def test_a_foreign_shard_with_its_own_checksum_is_named_and_not_read(
    store: RoundStore, other: RoundStore, old: bool, real_is: str
) -> None:
    """Whether it sorts before the real one or after it, and whether or not that is there."""
    if old:
        age(store)
    stored, before = store.round(0), contents(store)
    real = stored.shards("responses")[1]
    sources = [other.round(0).shards(stage)[1] for stage in ("responses", "rewards")]
    sources += [other.round(1).shards("responses")[0], other.held_out(0).shards("responses")[1]]
    sources += [other.held_out(1).shards("responses")[2], other.held_out(2).shards("responses")[2]]
    foreign = sorted({str(shutil.copy(file, real.parent)) for file in sources})
    assert {Path(f).name < real.name for f in foreign} == {True, False}  # of these
    if real_is == "gone":
        real.unlink()
        with pytest.raises(DamagedStoreError, match=f"{real.name} is damaged: it is missing"):
            stored.read("responses")
    else:
        assert contents(store) == before
    problems = find_problems(store)
    assert problems.strangers == sorted(map(Path, foreign))
    assert problems.damaged == ([] if real_is == "there" else [(problems.damaged[0][0], real)])
    with pytest.raises(DamagedStoreError, match=r"(?s)not of this run: .*parquet.*--repair"):
        problems.refuse()
    move_aside(store, problems.strangers)
    assert sorted(p.name for p in store.run_dir.glob("set_aside/rounds/0000/responses/*")) == sorted(
        Path(f).name for f in foreign
    )
    if real_is == "gone":
        stored.drop(real)
        stored.write_shard("responses", 1, pa.table({"a": [0, 1]}))
        stored.complete("responses")
        assert stored.shards("responses")[1] == real
    assert not find_problems(store)


STRANGE = {
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


@pytest.mark.parametrize("path", list(STRANGE))
def test_any_other_file_is_named_and_moved_aside(store: RoundStore, path: str) -> None:
    before = contents(store)
    file = store.run_dir / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(STRANGE[path])
    problems = find_problems(store)
    assert len(problems.strangers) == 1
    assert file.is_relative_to(problems.strangers[0])
    assert not problems.damaged
    assert not problems.missing
    move_aside(store, problems.strangers)
    assert (store.run_dir / "set_aside" / path).read_text() == STRANGE[path]
    assert not find_problems(store)
    assert contents(store) == before


@pytest.mark.parametrize(
    "name",
    [".DS_Store", ".nfs000012", "00000-0123456789abcdef.parquet~", ".00000-0123456789abcdef.parquet.tmp", "Thumbs.db"],
)
def test_hidden_files_and_backups_are_passed_over(store: RoundStore, name: str) -> None:
    for folder in ("rounds", "rounds/0000", "rounds/0000/responses"):
        (store.run_dir / folder / name).write_text("x")
    before = contents(store)
    assert not find_problems(store)
    assert contents(store) == before


@pytest.mark.parametrize("make", [lambda file: file.symlink_to("nowhere"), Path.mkdir, os.mkfifo])
def test_a_link_to_a_good_shard_is_taken_and_what_else_stands_there_is_damage(
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
def test_a_manifest_of_others_is_noticed_and_the_copy_taken(store: RoundStore, other: RoundStore, of: str) -> None:
    before, file = contents(store), store.round(1).path / "manifest.json"
    source = {"another run": other.round(1), "another round": store.round(0), "an evaluation": store.held_out(1)}[of]
    shutil.copy(source.path / "manifest.json", file)
    with pytest.raises(DamagedStoreError, match=r"manifest\.json belongs to"):
        _ = store.round(1).manifest
    problems = find_problems(store)
    assert ([bad for _, bad in problems.damaged], problems.strangers, problems.missing) == ([file], [], [])
    store.round(1).drop(file)
    assert not find_problems(store)
    assert contents(store) == before


@pytest.mark.parametrize("at", [1, 2, 7])
def test_a_round_of_another_run_is_a_stranger_as_a_whole(store: RoundStore, other: RoundStore, at: int) -> None:
    shutil.rmtree(store.round(at).path, ignore_errors=True)
    shutil.copytree(other.round(1).path, store.round(at).path)
    problems = find_problems(store)
    assert problems.strangers == [store.round(at).path]
    assert not problems.damaged
    assert [stored.name for stored in find_problems(store, rounds_done=2).missing] == (
        ["rounds/0001"] if at == 1 else []
    )


def test_a_round_beyond_one_that_is_not_there_is_a_stranger_too(store: RoundStore) -> None:
    shutil.copytree(store.round(1).path, store.round(7).path)
    shutil.copytree(store.held_out(1).path, store.held_out(9).path)
    age(store)  # nothing tells whose it is
    assert find_problems(store, rounds_done=2).strangers == [store.held_out(9).path, store.round(7).path]


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    ("gone", "missing"),
    [
        ("rounds/0000", ["rounds/0000"]),
        ("heldout/0000", ["heldout/0000"]),
        ("heldout", ["heldout/0000", "heldout/0001"]),
        ("rounds", ["rounds/0000", "rounds/0001"]),
        ("rounds/0001", ["rounds/0001"]),
    ],
)
def test_what_is_gone_is_named(store: RoundStore, gone: str, missing: list[str], old: bool) -> None:
    if old:
        age(store)
    shutil.rmtree(store.run_dir / gone)
    problems = find_problems(store, rounds_done=2)
    assert [stored.name for stored in problems.missing] == missing
    assert not problems.strangers
    for stored in problems.missing:
        store.give_up(stored)
    assert not find_problems(store, rounds_done=2)


def test_evaluations_are_not_missed_where_there_were_none(tmp_path: Path) -> None:
    store = RoundStore(tmp_path)
    fill(store.round(0), 0, held_out=0)
    assert not find_problems(store, rounds_done=1)


@pytest.mark.parametrize("text", [None, "", "{", '{"run": "x"}', "\x00"])
def test_the_store_knows_its_run_without_its_own_file(store: RoundStore, other: RoundStore, text: str | None) -> None:
    run, file = store.noted_run, store.run_dir / "store.json"
    file.unlink() if text is None else file.write_text(text)
    assert not find_problems(store)
    shutil.copytree(other.round(1).path, store.round(2).path)
    assert find_problems(store).strangers == [store.round(2).path]
    shutil.rmtree(store.round(2).path)
    fill(store.round(2), 2)
    assert store.noted_run == run


def test_a_store_file_of_another_run_is_the_stranger(store: RoundStore, other: RoundStore) -> None:
    """All rounds say otherwise: they stay, and keep the run that they are of."""
    run = store.run
    shutil.copy(other.run_dir / "store.json", store.run_dir / "store.json")
    problems = find_problems(store, 2)
    assert problems.lines() == [f"not of this run: {store.run_dir / 'store.json'}"]
    move_aside(store, problems.strangers)
    assert not find_problems(store, 2)
    assert store.identify() == store.noted_run == run


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
    """Killed before every flush and rename, then every shard that was renamed counts, and nothing is a stranger."""
    done = []
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
        there = list((stored.path / "responses").glob("[0-9]*.parquet"))
        assert sorted(stored.shards("responses").values()) == sorted(there)
        assert not find_problems(store)
        store.tidy()
        before = {file: file.stat().st_mtime_ns for file in there}
        fill_rest(stored)
        assert {file: file.stat().st_mtime_ns for file in there} == before
        assert stored.read("responses")["a"].to_pylist() == [1, 0, 1, 1, 1, 2]
        assert not find_problems(store)
        left = [p.name for p in tmp_path.rglob(f"{step}/rounds/**/*") if p.is_file() and p.suffix != ".parquet"]
        assert sorted(left) == [".manifest.copy.json", "manifest.json"]
        if code == 0:
            break
        done.append(len(there))
    assert code == 0
    assert set(done) == {0, 1, 2, 3}


def fill_rest(stored: Round) -> None:
    """Go on as a stage does."""
    if not stored.manifest.get("settings"):
        stored.update(settings={})
    for number in set(range(3)) - set(stored.shards("responses")):
        stored.write_shard("responses", number, pa.table({"a": [1, number]}))
    stored.complete("responses")


def test_a_shard_that_is_replaced_survives_a_kill_before_the_new_one_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    assert not strangers_in(stored, RoundStore(stored.run_dir).run)
    monkeypatch.undo()
    stored.write_shard("rewards", 0, pa.table({"a": [2]}))
    assert stored.read_shard("rewards", 0)["a"].to_pylist() == [2]
    assert len(list((stored.path / "rewards").glob("*.parquet"))) == 1


def test_a_shard_of_a_stage_in_progress_needs_this_rounds_note(store: RoundStore, other: RoundStore) -> None:
    """A whole stage folder of another run, notes and all, copied over one in progress."""
    mine, theirs = store.round(2), other.round(2)
    for stored, salt, numbers in ((mine, 1, [0]), (theirs, 2, [0, 1])):
        stored.update(settings={"responses": {"seed": salt}})
        for number in numbers:
            stored.write_shard("responses", number, pa.table({"a": [salt, number]}))
    for file in (theirs.path / "responses").iterdir():
        if not (mine.path / "responses" / file.name).exists():
            shutil.copy(file, mine.path / "responses")
    assert list(mine.shards("responses")) == [0]
    strange = {path.name for path in find_problems(store).strangers}
    assert strange == {file.name for file in theirs.shards("responses").values()} | {"_00001.shard"}


def test_of_two_shards_with_one_number_an_unfinished_stage_of_older_versions_takes_neither(store: RoundStore) -> None:
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
    assert len(find_problems(store).strangers) == 2
    store.tidy()
    assert list(stored.shards("responses")) == [0]
    assert len(find_problems(store).strangers) == 2


def test_a_stored_run_of_an_older_version_opens_as_it_is(tmp_path: Path) -> None:
    """Two rounds of 12 prompts with 3 responses each, by a version whose manifests named neither run nor round."""
    with tarfile.open(Path(__file__).with_name("store_without_notes.tar.gz")) as archive:
        archive.extractall(tmp_path, filter="data")
    store = RoundStore(tmp_path)
    assert not find_problems(store, rounds_done=2)
    shards = {file: file.read_bytes() for file in tmp_path.rglob("*.parquet")}
    rewards = [store.round(index).read("rewards")["reward"].to_pylist() for index in range(2)]
    assert [sum(numbers) / 36 for numbers in rewards] == pytest.approx(
        [store.round(index).info("rewards")["mean"] for index in range(2)]
    )
    store.tidy()
    assert not find_problems(store, rounds_done=2)
    assert shards == {file: file.read_bytes() for file in tmp_path.rglob("*.parquet")}
    foreign = shutil.copy(store.round(0).shards("responses")[1], store.round(1).path / "responses")
    assert find_problems(store, rounds_done=2).strangers == [Path(foreign)]
