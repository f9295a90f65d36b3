"""A round in the store: its stages as Parquet shards, under a manifest."""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rlhf_pl.store.files import (
    JOURNAL,
    SHARD,
    DamagedStoreError,
    checksum,
    has_parquet_ends,
    is_whole_shard,
    read_checked,
    read_shard_file,
    remove,
    set_aside,
    write_checked,
)
from rlhf_pl.store.journal import cut_journal, is_whole_journal
from rlhf_pl.store.manifest import ORDER, STAGES, Manifest, as_stored, shard_number, shards_by_name
from rlhf_pl.store.run_identity import HELD_OUT, is_own, name_of
from rlhf_pl.utils.disk import write_atomically
from rlhf_pl.utils.errors import InputError


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
        self.path, self._manifest = path, Manifest(path)

    @property
    def name(self) -> str:
        """`rounds/0002`."""
        return name_of(self.path)

    @property
    def run_dir(self) -> Path:
        """The run directory."""
        return self.path.parent.parent

    @property
    def is_held_out(self) -> bool:
        """Whether this is an evaluation on the held-out prompts."""
        return self.path.parent.name == HELD_OUT

    @property
    def manifest(self) -> dict[str, Any]:
        """Settings, counts, times and per-stage completeness; empty stages if nothing is there yet.

        Raises:
            DamagedStoreError: The file is damaged, or another run's or round's.
        """
        return self._manifest.read()

    def is_own(self, content: dict[str, Any], run: str | None) -> bool:
        """Whether a manifest or note is this round's, of this run; manifests of older versions do not say."""
        return is_own(self.path, content, run)

    @staticmethod
    def as_stored(content: Any) -> Any:
        """What `content` is once it went through the manifest's JSON, which has no secrets."""
        return as_stored(content)

    def update(self, **entries: Any) -> None:
        """Merge `entries` into the manifest."""
        self._manifest.write(self.manifest | entries)

    def complete(self, stage: str, **info: Any) -> None:
        """Mark `stage` complete, with its counts and times."""
        manifest = self.manifest
        shards = {"shards": [file.name for file in self.shards(stage).values()]} if stage in STAGES else {}
        manifest["stages"][stage] = {"complete": True, **info, **shards}
        self._manifest.write(manifest)
        if shards:
            self._forget_notes(stage)

    def is_complete(self, stage: str) -> bool:
        return bool(self.manifest["stages"].get(stage, {}).get("complete"))

    def info(self, stage: str) -> dict[str, Any]:
        """What `complete` recorded."""
        return self.manifest["stages"][stage]

    def shards(self, stage: str, number: int | None = None) -> dict[int, Path]:
        """The round's shards that are there, by number, ascending; or just the one of a number."""
        return self._there(stage, self.manifest, number)

    def _there(self, stage: str, manifest: dict[str, Any], number: int | None = None) -> dict[int, Path]:
        there = {}
        for name in self._known(stage, manifest, number):
            if (self.path / stage / name).exists():
                there[shard_number(name)] = self.path / stage / name
        return dict(sorted(there.items()))

    def _known(self, stage: str, manifest: dict[str, Any], number: int | None = None) -> list[str]:
        """Names of a stage's shards, whether they are there or not; of one number the newest comes last."""
        info = manifest["stages"].get(stage, {})
        names = [*info.get("shards", []), *info.get("kept", [])]
        if not info.get("complete") and "run" not in manifest:  # of a version that wrote no notes
            names += shards_by_name(self.path / stage)
        elif not info.get("complete"):
            notes = (self.path / stage).glob("_*.shard") if number is None else [self._note(stage, number)]
            for content in filter(None, map(read_checked, notes)):
                if content.get("stage") == stage and self.is_own(content, manifest["run"]):
                    names += content["shards"]
        return [name for name in names if number in (None, shard_number(name))]

    def _note(self, stage: str, number: int) -> Path:
        """Where the shards of a number are named until their stage is complete."""
        return self.path / stage / f"_{number:05d}.shard"

    def known(self, stage: str) -> set[str]:
        """Names of the stage's shards; by a manifest that is damaged, all that have such names."""
        try:
            return set(self._known(stage, self.manifest))
        except DamagedStoreError:
            return set(self._known(stage, self._manifest.read_copy() or {"stages": {}}))

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

    def read(self, stage: str, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows of a stage, in shard order; of these columns alone, where they are named.

        Raises:
            DamagedStoreError: A shard is missing or damaged.
        """
        return pa.concat_tables(self.read_shards(stage, columns))

    def read_shards(self, stage: str, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The same, shard by shard: never more than one is in memory.

        Raises:
            DamagedStoreError: A shard is missing or damaged.
        """
        manifest = self.manifest
        for name in manifest["stages"].get(stage, {}).get("shards", []):
            if not (self.path / stage / name).exists():
                raise DamagedStoreError(_damaged(self.path / stage / name))
        for file in self._there(stage, manifest).values():
            yield _read_table(file, columns)

    def read_shard(self, stage: str, number: int, columns: Sequence[str] | None = None) -> pa.Table:
        """One shard.

        Raises:
            DamagedStoreError: It is missing, or its content does not match its checksum.
        """
        file = self.shards(stage, number).get(number)
        if file is None:
            raise DamagedStoreError(_damaged(self.path / stage / f"{number:05d}-*.parquet"))
        return _read_table(file, columns)

    def damage(self, checksums: bool = True) -> list[Path]:
        """Files that are damaged or missing: the manifest first, then shards.

        Args:
            checksums: Read all shards and journals. Otherwise only what costs nothing is looked at: shards must be
                there and have a Parquet file's ends, which one that was cut off has not.
        """
        is_whole = is_whole_shard if checksums else has_parquet_ends
        bad: list[Path] = []
        try:
            manifest = self.manifest
        except DamagedStoreError:
            bad.append(self.path / "manifest.json")
            manifest = self._manifest.read_copy() or {"stages": {}}
        for stage in STAGES:
            files = [self.path / stage / name for name in dict.fromkeys(self._known(stage, manifest))]
            info = manifest["stages"].get(stage, {})
            # lost: to a repair that did not finish
            wanted = {*info.get("shards", []), *info.get("lost", [])}
            files += [self.path / stage / name for name in info.get("lost", [])]
            bad += sorted({f for f in files if (os.path.lexists(f) or f.name in wanted) and not is_whole(f)})
        if checksums and not manifest["stages"].get("rewards", {}).get("complete"):
            bad += [file for file in sorted((self.path / "rewards").glob("_*.journal")) if not is_whole_journal(file)]
        there = any(shards_by_name(self.path / stage) for stage in STAGES)
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
        if file.name == "manifest.json" and (copy := self._manifest.read_copy()) is not None:
            self._manifest.write(copy)
        if not SHARD.fullmatch(file.name):
            return
        manifest = self.manifest
        stage = manifest["stages"].get(file.parent.name)
        if stage is not None:
            stage["complete"] = False
            stage["lost"] = [*stage.get("lost", []), file.name]
            for names in ("shards", "kept"):
                stage[names] = [name for name in stage.get(names, []) if name != file.name]
            self._manifest.write(manifest)

    def tidy(self) -> None:
        """What a process that died has left behind; and a manifest of an older version says whose it is from here on.

        To be called by the owner of the run directory alone.
        """
        manifest = self.manifest
        if not manifest["stages"] and "settings" not in manifest:
            return
        if "run" not in manifest or self._manifest.read_copy() is None:
            self._manifest.write(manifest)
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
            self._manifest.write(manifest)

    def clear(self, first: str = "responses") -> None:
        """Delete the stage `first` and all after it; with `training`, only its entry in the manifest."""
        gone = ORDER[ORDER.index(first) :]
        manifest = self.manifest
        manifest["stages"] = {name: info for name, info in manifest["stages"].items() if name not in gone}
        self._manifest.write(manifest)  # first: a stage without its mark is made again
        for stage in gone:
            shutil.rmtree(self.path / stage, ignore_errors=True)

    def delete(self) -> None:
        """Remove the whole folder, the manifest last."""
        for stage in STAGES:
            shutil.rmtree(self.path / stage, ignore_errors=True)
        shutil.rmtree(self.path, ignore_errors=True)


def _read_table(file: Path, columns: Sequence[str] | None) -> pa.Table:
    """A shard that is what was written, or those columns of it."""
    content = read_shard_file(file)
    if content is None:
        raise DamagedStoreError(_damaged(file))
    try:
        return pq.read_table(pa.BufferReader(content), columns=None if columns is None else list(columns))
    except pa.ArrowException as error:
        raise DamagedStoreError(_damaged(file)) from error


def _damaged(file: Path) -> str:
    what = "its checksum does not match" if os.path.lexists(file) else "it is missing"
    return f"{file} is damaged: {what}. The same command with --repair makes it again."
