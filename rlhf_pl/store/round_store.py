"""The round store: everything a round produced, as Parquet shards under a manifest."""

import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rlhf_pl.store.files import (
    JOURNAL,
    SHARD,
    DamagedStoreError,
    checksum,
    entries,
    read_checked,
    read_shard_file,
    remove,
    set_aside,
    write_checked,
)
from rlhf_pl.store.journal import cut_journal, is_whole_journal
from rlhf_pl.utils.disk import write_atomically
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.secrets import redacted

SCHEMA_VERSION = 2
STORE = "store.json"  # of a run directory: which run its rounds are of
COPY = ".manifest.copy.json"
STAGES = ("responses", "rewards", "pairs", "logps")
ORDER = (*STAGES, "training")  # what a later one is made of comes first


class Round:
    """One folder of the store, such as `rounds/0002` or `heldout/0003`.

    A shard is `<stage>/<number>-<checksum>.parquet`, written under a temporary name and renamed: a file that exists is
    whole, and its name tells whether it still is. A stage is complete when the manifest says so and lists its shards.
    Until then a note beside each shard, `_<number>.shard`, names it, the round and the run: it is written before the
    shard is renamed, so that a file without one is not the round's. Whatever died before goes on from these shards.

    Args:
        path: The folder; created on the first write.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        """`rounds/0002`."""
        return f"{self.path.parent.name}/{self.path.name}"

    @property
    def run_dir(self) -> Path:
        """The run directory."""
        return self.path.parent.parent

    @property
    def is_held_out(self) -> bool:
        """Whether this is an evaluation on the held-out prompts."""
        return self.path.parent.name == "heldout"

    @property
    def manifest(self) -> dict[str, Any]:
        """Settings, counts, times and per-stage completeness; empty stages if nothing is there yet.

        Raises:
            DamagedStoreError: The file is damaged, or another run's or round's.
        """
        file = self.path / "manifest.json"
        if not os.path.lexists(file):
            return {"schema_version": SCHEMA_VERSION, "stages": {}}
        content = read_checked(file)
        if content is None:
            raise DamagedStoreError(_damaged(file))
        if content["schema_version"] != SCHEMA_VERSION:
            raise InputError(
                f"{file} has schema version {content['schema_version']}, and this version of rlhf_pl reads "
                f"{SCHEMA_VERSION}. Give this run a directory of its own (--trainer.default_root_dir DIR)."
            )
        for name in ("settings", "accepted"):  # as they are stored now, in manifests of earlier versions too
            if name in content:
                content[name] = redacted(content[name])
        if not self.is_own(content, RoundStore(self.run_dir).noted_run):
            raise DamagedStoreError(
                f"{file} belongs to {content.get('round')} of another run or folder. The same command with --repair "
                "moves it aside."
            )
        return content

    def is_own(self, content: dict[str, Any], run: str | None) -> bool:
        """Whether a manifest or note is this round's, of this run; manifests of older versions do not say."""
        return "run" not in content or (content.get("round") == self.name and run in (None, content["run"]))

    @staticmethod
    def as_stored(content: Any) -> Any:
        """What `content` is once it went through the manifest's JSON, which has no secrets."""
        return redacted(json.loads(json.dumps(content, default=str)))

    def update(self, **entries: Any) -> None:
        """Merge `entries` into the manifest."""
        self._write_manifest(self.manifest | entries)

    def complete(self, stage: str, **info: Any) -> None:
        """Mark `stage` complete, with its counts and times."""
        manifest = self.manifest
        shards = {"shards": [file.name for file in self.shards(stage).values()]} if stage in STAGES else {}
        manifest["stages"][stage] = {"complete": True, **info, **shards}
        self._write_manifest(manifest)
        if shards:
            self._forget_notes(stage)

    def is_complete(self, stage: str) -> bool:
        return bool(self.manifest["stages"].get(stage, {}).get("complete"))

    def info(self, stage: str) -> dict[str, Any]:
        """What `complete` recorded."""
        return self.manifest["stages"][stage]

    def shards(self, stage: str, number: int | None = None) -> dict[int, Path]:
        """The round's shards that are there, by number, ascending; or just the one of a number."""
        there = {}
        for name in self._known(stage, self.manifest, number):
            if (self.path / stage / name).exists():
                there[_number(name)] = self.path / stage / name
        return dict(sorted(there.items()))

    def _known(self, stage: str, manifest: dict[str, Any], number: int | None = None) -> list[str]:
        """Names of a stage's shards, whether they are there or not; of one number the newest comes last."""
        info = manifest["stages"].get(stage, {})
        names = [*info.get("shards", []), *info.get("kept", [])]
        if not info.get("complete") and "run" not in manifest:  # of a version that wrote no notes
            names += self._by_name(stage)
        elif not info.get("complete"):
            notes = (self.path / stage).glob("_*.shard") if number is None else [self._note(stage, number)]
            for content in filter(None, map(read_checked, notes)):
                if content.get("stage") == stage and self.is_own(content, manifest["run"]):
                    names += content["shards"]
        return [name for name in names if number in (None, _number(name))]

    def _note(self, stage: str, number: int) -> Path:
        """Where the shards of a number are named until their stage is complete."""
        return self.path / stage / f"_{number:05d}.shard"

    def known(self, stage: str) -> set[str]:
        """Names of the stage's shards; by a manifest that is damaged, all that have such names."""
        try:
            return set(self._known(stage, self.manifest))
        except DamagedStoreError:
            return set(self._known(stage, self._copy() or {"stages": {}}))

    def _by_name(self, stage: str) -> list[str]:
        """What is there under the name of a shard; of two with one number neither."""
        names = [path.name for path in entries(self.path / stage) if SHARD.fullmatch(path.name)]
        numbers = [_number(name) for name in names]
        return [name for name in names if numbers.count(_number(name)) == 1]

    def await_shards(self, stage: str, count: int, seconds: float = 60.0) -> None:
        """Wait until all shards of a stage can be seen: a shared file system shows those of other hosts late.

        Raises:
            InputError: They do not appear.
        """
        end = time.monotonic() + seconds
        while len(found := self.shards(stage)) < count:
            if time.monotonic() > end:
                raise InputError(
                    f"`trainer.default_root_dir`: {self.path / stage} shows {len(found)} of {count} files that the "
                    "ranks wrote. It must be on a file system that all nodes share."
                )
            time.sleep(0.2)

    def write_shard(self, stage: str, number: int, table: pa.Table) -> None:
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        content = sink.getvalue()
        target = self.path / stage / f"{number:05d}-{checksum(content)}.parquet"
        manifest = self.manifest
        known = [name for name in self._known(stage, manifest, number) if name != target.name]
        olds = [self.path / stage / name for name in known]  # of another policy, or under another rule for failures
        if "run" in manifest:
            names = [*(old.name for old in olds if old.exists()), target.name]
            note = {"run": manifest["run"], "round": self.name, "stage": stage, "shards": names}
            write_checked(self._note(stage, number), note)
        write_atomically(target, lambda file: file.write(content), content.size)
        for old in olds:
            old.unlink(missing_ok=True)

    def read(self, stage: str) -> pa.Table:
        """All rows of a stage, in shard order.

        Raises:
            DamagedStoreError: A shard is missing or damaged.
        """
        for name in self.manifest["stages"].get(stage, {}).get("shards", []):
            if not (self.path / stage / name).exists():
                raise DamagedStoreError(_damaged(self.path / stage / name))
        return pa.concat_tables([self.read_shard(stage, number) for number in self.shards(stage)])

    def read_shard(self, stage: str, number: int) -> pa.Table:
        """One shard.

        Raises:
            DamagedStoreError: It is missing, or its content does not match its checksum.
        """
        file = self.shards(stage, number).get(number)
        if file is None:
            raise DamagedStoreError(_damaged(self.path / stage / f"{number:05d}-*.parquet"))
        content = read_shard_file(file)
        if content is None:
            raise DamagedStoreError(_damaged(file))
        try:
            return pq.read_table(pa.BufferReader(content))
        except pa.ArrowException as error:
            raise DamagedStoreError(_damaged(file)) from error

    def damage(self) -> list[Path]:
        """Files that are damaged or missing: the manifest first, then shards."""
        bad: list[Path] = []
        try:
            manifest = self.manifest
        except DamagedStoreError:
            bad.append(self.path / "manifest.json")
            manifest = self._copy() or {"stages": {}}
        for stage in STAGES:
            files = [self.path / stage / name for name in dict.fromkeys(self._known(stage, manifest))]
            info = manifest["stages"].get(stage, {})
            # lost: to a repair that did not finish
            wanted = {*info.get("shards", []), *info.get("lost", [])}
            files += [self.path / stage / name for name in info.get("lost", [])]
            bad += sorted({f for f in files if (os.path.lexists(f) or f.name in wanted) and read_shard_file(f) is None})
        if not manifest["stages"].get("rewards", {}).get("complete"):
            bad += [file for file in sorted((self.path / "rewards").glob("_*.journal")) if not is_whole_journal(file)]
        there = any(self._by_name(stage) for stage in STAGES)
        if not os.path.lexists(self.path / "manifest.json") and there:
            bad.insert(0, self.path / "manifest.json")
        return bad

    def drop(self, file: Path) -> None:
        """Forget one damaged file, so that it is made again; its neighbours stay. The manifest comes from its copy."""
        if file.is_dir() and not file.is_symlink():
            set_aside(self.run_dir, file)
        elif JOURNAL.fullmatch(file.name):
            cut_journal(file)
        else:
            file.unlink(missing_ok=True)
        if file.name == "manifest.json" and (copy := self._copy()) is not None:
            self._write_manifest(copy)
        if not SHARD.fullmatch(file.name):
            return
        manifest = self.manifest
        stage = manifest["stages"].get(file.parent.name)
        if stage is not None:
            stage["complete"] = False
            stage["lost"] = [*stage.get("lost", []), file.name]
            for names in ("shards", "kept"):
                stage[names] = [name for name in stage.get(names, []) if name != file.name]
            self._write_manifest(manifest)

    def _copy(self) -> dict[str, Any] | None:
        """The manifest's copy, if it is whole and this round's."""
        copy = read_checked(self.path / COPY)
        return copy if copy is not None and self.is_own(copy, RoundStore(self.run_dir).noted_run) else None

    def tidy(self) -> None:
        """What a process that died has left behind; and a manifest of an older version says whose it is from here on.

        To be called by the owner of the run directory alone.
        """
        manifest = self.manifest
        if not manifest["stages"] and "settings" not in manifest:
            return
        if "run" not in manifest or self._copy() is None:
            self._write_manifest(manifest)
        for left in [*self.path.glob(".*.tmp"), *self.path.glob("*/.*.tmp")]:
            remove(left)
        for stage in STAGES:
            if self.is_complete(stage):
                self._forget_notes(stage)

    def _forget_notes(self, stage: str) -> None:
        """Of a stage that is complete: the manifest has its list."""
        for kind in ("_*.shard", "_*.journal"):
            for file in (self.path / stage).glob(kind):
                file.unlink()

    def reopen(self, stage: str) -> None:
        """Let `stage` go through its shards again, and make all after it anew."""
        self.clear(STAGES[STAGES.index(stage) + 1])
        manifest = self.manifest
        if stage in manifest["stages"]:
            info = manifest["stages"][stage]
            # its shards may get other names, and a kill in between is no damage
            info |= {"complete": False, "kept": [*info.get("kept", []), *info.get("shards", [])], "shards": []}
            self._write_manifest(manifest)

    def clear(self, first: str = "responses") -> None:
        """Delete the stage `first` and all after it; with `training`, only its entry in the manifest."""
        gone = ORDER[ORDER.index(first) :]
        manifest = self.manifest
        manifest["stages"] = {name: info for name, info in manifest["stages"].items() if name not in gone}
        self._write_manifest(manifest)  # first: a stage without its mark is made again
        for stage in gone:
            shutil.rmtree(self.path / stage, ignore_errors=True)

    def delete(self) -> None:
        """Remove the whole folder, the manifest last."""
        for stage in STAGES:
            shutil.rmtree(self.path / stage, ignore_errors=True)
        shutil.rmtree(self.path, ignore_errors=True)

    def _write_manifest(self, content: dict[str, Any]) -> None:
        content = self.as_stored(content)
        if "run" not in content:  # a new one, or an older version's: what is there by then is its own
            for stage, info in content["stages"].items():
                if stage in STAGES and not info.get("complete"):
                    info["kept"] = self._by_name(stage)
            begun = {s: {"complete": False, "kept": self._by_name(s)} for s in STAGES if s not in content["stages"]}
            content["stages"] |= {stage: info for stage, info in begun.items() if info["kept"]}
            content |= {"run": RoundStore(self.run_dir).identify(), "round": self.name}
        # The copy first: what is killed before the manifest is written is done again, and clears up behind itself.
        for name in (COPY, "manifest.json"):
            write_checked(self.path / name, content)


class RoundStore:
    """The rounds of a run directory, and the evaluations on held-out prompts beside them.

    Args:
        run_dir: The run directory.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.run_dir = Path(run_dir)

    @property
    def noted_run(self) -> str | None:
        """Which run the store is of, as its file says; None if that says nothing."""
        run = (read_checked(self.run_dir / STORE) or {}).get("run")
        return run if isinstance(run, str) else None

    @property
    def run(self) -> str | None:
        """Which run the store is of; where no manifest is of the noted one, as most say. None for older versions."""
        noted = self.noted_run
        contents = [(stored, read_checked(stored.path / "manifest.json")) for stored in self.everything()]
        runs = [c["run"] for stored, c in contents if c is not None and "run" in c and stored.is_own(c, None)]
        return noted if noted in runs or not runs else max(runs, key=runs.count)

    def identify(self) -> str:
        """Which run the store is of, noted for good."""
        run = self.run or secrets.token_hex(8)
        if self.noted_run is None:
            write_checked(self.run_dir / STORE, {"run": run})
        return run

    @property
    def given_up(self) -> list[str]:
        """Names of rounds that are lost, and without which the run goes on."""
        return (read_checked(self.run_dir / STORE) or {}).get("given_up", [])

    def give_up(self, stored: Round) -> None:
        """Note that the run goes on without a round that was lost."""
        given_up = sorted({*self.given_up, stored.name})
        write_checked(self.run_dir / STORE, {"run": self.identify(), "given_up": given_up})

    def round(self, index: int) -> Round:
        """What the policy after `index` rounds generated for training."""
        return Round(self.run_dir / "rounds" / f"{index:04d}")

    def held_out(self, version: int) -> Round:
        """What the policy after `version` rounds answered to the held-out prompts."""
        return Round(self.run_dir / "heldout" / f"{version:04d}")

    def rounds(self) -> dict[int, Round]:
        """The rounds that are there, ascending."""
        return dict(_numbered(self.run_dir / "rounds"))

    def evaluations(self) -> dict[int, Round]:
        """The evaluations that are there, ascending."""
        return dict(_numbered(self.run_dir / "heldout"))

    def everything(self) -> list[Round]:
        """The rounds and evaluations that are there."""
        return [*self.rounds().values(), *self.evaluations().values()]

    def tidy(self) -> None:
        """What processes that died have left behind; to be called by the owner of the run directory alone."""
        for stored in self.everything():
            stored.tidy()

    def damage(self) -> list[tuple[Round, Path]]:
        """Every damaged or missing file, with its round."""
        return [(stored, file) for stored in self.everything() for file in stored.damage()]


def _numbered(folder: Path) -> Iterator[tuple[int, Round]]:
    for path in entries(folder):
        if path.name.isdecimal() and path.name == f"{int(path.name):04d}" and path.is_dir():
            yield int(path.name), Round(path)


def _number(name: str) -> int:
    """Of a shard."""
    return int(name.split("-")[0])


def _damaged(file: Path) -> str:
    what = "its checksum does not match" if os.path.lexists(file) else "it is missing"
    return f"{file} is damaged: {what}. The same command with --repair makes it again."
