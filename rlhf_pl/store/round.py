"""A round in the store: the Parquet shards of its stages, and a manifest."""

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
from rlhf_pl.store.journal import is_whole_journal, truncate_journal
from rlhf_pl.store.manifest import ORDER, STAGES, Manifest, as_stored, find_shard_names, parse_shard_number
from rlhf_pl.store.run_identity import HELD_OUT, is_own, round_name
from rlhf_pl.utils.disk import write_atomically
from rlhf_pl.utils.errors import InputError


class Round:
    """One folder of the store, e.g. `rounds/0002` or `heldout/0003`.

    A shard is `<stage>/<number>-<checksum>.parquet`. It is written atomically, and the checksum in its name detects
    later damage. A complete stage is marked in the manifest, which lists its shards. Before that, a note for each
    shard, `_<number>.shard`, names the shard, the round and the run. The note is written before the shard, so a shard
    without a note is foreign. A stage that was interrupted continues after its existing shards.

    Args:
        path: The folder; created by the first write.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._manifest = path, Manifest(path)

    @property
    def name(self) -> str:
        """Name of the round, e.g. `rounds/0002`."""
        return round_name(self.path)

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
        """Settings, counts, times and complete stages; without a file, it has no stages.

        Raises:
            DamagedStoreError: The file is damaged, or of another run or round.
        """
        return self._manifest.read()

    def is_own(self, content: dict[str, Any], run: str | None) -> bool:
        """Whether a manifest or note is of this round and of `run`; always true for manifests of older versions."""
        return is_own(self.path, content, run)

    @staticmethod
    def as_stored(content: Any) -> Any:
        """Convert an object to the form in which a manifest stores it: JSON without secrets."""
        return as_stored(content)

    def update(self, **entries: Any) -> None:
        """Merge `entries` into the manifest."""
        self._manifest.write(self.manifest | entries)

    def complete(self, stage: str, **info: Any) -> None:
        """Mark a stage complete, with its counts and times."""
        manifest = self.manifest
        shards = {"shards": [file.name for file in self.shards(stage).values()]} if stage in STAGES else {}
        if "seconds_before" in manifest["stages"].get(stage, {}):
            info["seconds"] += manifest["stages"][stage]["seconds_before"]
        manifest["stages"][stage] = {"complete": True, **info, **shards}
        self._manifest.write(manifest)
        if shards:
            self._remove_notes(stage)

    def is_complete(self, stage: str) -> bool:
        return _is_complete(self.manifest, stage)

    def info(self, stage: str) -> dict[str, Any]:
        """The counts and times that `complete` recorded."""
        return self.manifest["stages"][stage]

    def shards(self, stage: str, number: int | None = None) -> dict[int, Path]:
        """The existing shards of a stage by number, ascending; only that of `number` if it is given."""
        manifest = self.manifest
        existing = self._existing_shards(stage, manifest, number)
        # meanwhile another thread or rank may have completed the stage, which removes the notes
        while not _is_complete(manifest, stage) and (newer := self.manifest) != manifest:
            manifest = newer
            existing = self._existing_shards(stage, manifest, number)
        return existing

    def _existing_shards(self, stage: str, manifest: dict[str, Any], number: int | None = None) -> dict[int, Path]:
        existing = {}
        for name in self._list_known(stage, manifest, number):
            if (self.path / stage / name).exists():
                existing[parse_shard_number(name)] = self.path / stage / name
        return dict(sorted(existing.items()))

    def _list_known(self, stage: str, manifest: dict[str, Any], number: int | None = None) -> list[str]:
        """Names of a stage's shards, including missing ones; of shards with one number, the newest is last."""
        info = manifest["stages"].get(stage, {})
        names = [*info.get("shards", []), *info.get("kept", [])]
        if not info.get("complete") and "run" not in manifest:  # written by a version without notes
            names += find_shard_names(self.path / stage)
        elif not info.get("complete"):
            notes = (self.path / stage).glob("_*.shard") if number is None else [self._note_path(stage, number)]
            for content in filter(None, map(read_checked, notes)):
                if content.get("stage") == stage and self.is_own(content, manifest["run"]):
                    names += content["shards"]
        return [name for name in names if number in (None, parse_shard_number(name))]

    def _note_path(self, stage: str, number: int) -> Path:
        """Path of the note that names the shards of a number until their stage is complete."""
        return self.path / stage / f"_{number:05d}.shard"

    def known(self, stage: str) -> set[str]:
        """Names of a stage's shards, by the manifest or, if it is damaged, by its copy."""
        try:
            return set(self._list_known(stage, self.manifest))
        except DamagedStoreError:
            return set(self._list_known(stage, self._manifest.read_copy() or {"stages": {}}))

    def await_shards(self, stage: str, count: int, seconds: float = 60.0) -> None:
        """Wait until all shards of a stage are visible: a shared file system shows those of other hosts with a delay.

        Raises:
            InputError: They do not appear in time.
        """
        end = time.monotonic() + seconds
        while len(found := self.shards(stage)) < count:
            if time.monotonic() > end:
                raise InputError(
                    f"`trainer.default_root_dir`: {self.path / stage} has {len(found)} of the {count} files that the "
                    "ranks wrote. It must be on a file system that all nodes share."
                )
            time.sleep(0.2)

    def write_shard(self, stage: str, number: int, table: pa.Table) -> None:
        """Write a shard atomically; it replaces an earlier shard with the same number."""
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        self.write_shard_bytes(stage, number, sink.getvalue())

    def write_shard_bytes(self, stage: str, number: int, content: Any) -> None:
        """Write the bytes of a Parquet file as a shard, in the same way."""
        target = self.path / stage / f"{number:05d}-{checksum(content)}.parquet"
        manifest = self.manifest
        known = [name for name in self._list_known(stage, manifest, number) if name != target.name]
        replaced = [self.path / stage / name for name in known]  # of another policy or another `on_failure`
        if "run" in manifest:
            names = [*(file.name for file in replaced if file.exists()), target.name]
            note = {"run": manifest["run"], "round": self.name, "stage": stage, "shards": names}
            write_checked(self._note_path(stage, number), note)
        write_atomically(target, lambda file: file.write(content), len(content))
        for file in replaced:
            file.unlink(missing_ok=True)

    def read(self, stage: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Read all rows of a stage in shard order, or only some columns.

        Raises:
            DamagedStoreError: A shard is missing or damaged.
        """
        return pa.concat_tables(self.read_shards(stage, columns))

    def read_shards(self, stage: str, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Read the rows of a stage shard by shard, to limit memory.

        Raises:
            DamagedStoreError: A shard is missing or damaged.
        """
        manifest = self.manifest
        for name in manifest["stages"].get(stage, {}).get("shards", []):
            if not (self.path / stage / name).exists():
                raise DamagedStoreError(_describe_damage(self.path / stage / name))
        for file in self._existing_shards(stage, manifest).values():
            yield _read_table(file, columns)

    def read_shard(self, stage: str, number: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Read one shard.

        Raises:
            DamagedStoreError: The shard is missing or damaged.
        """
        file = self.shards(stage, number).get(number)
        if file is None:
            raise DamagedStoreError(_describe_damage(self.path / stage / f"{number:05d}-*.parquet"))
        return _read_table(file, columns)

    def find_damage(self, checksums: bool = True) -> list[Path]:
        """Files that are damaged or missing: the manifest first, then shards.

        Args:
            checksums: Verify the checksums of all shards and journals. Otherwise only check that shards exist and have
                the first and last bytes of a Parquet file, which is fast and detects truncated files.
        """
        is_whole = is_whole_shard if checksums else has_parquet_ends
        bad: list[Path] = []
        try:
            manifest = self.manifest
        except DamagedStoreError:
            bad.append(self.path / "manifest.json")
            manifest = self._manifest.read_copy() or {"stages": {}}
        for stage in STAGES:
            files = [self.path / stage / name for name in dict.fromkeys(self._list_known(stage, manifest))]
            info = manifest["stages"].get(stage, {})
            # `lost` lists files that an interrupted repair has dropped
            expected = {*info.get("shards", []), *info.get("lost", [])}
            files += [self.path / stage / name for name in info.get("lost", [])]
            bad += sorted({f for f in files if (os.path.lexists(f) or f.name in expected) and not is_whole(f)})
        if checksums and not manifest["stages"].get("rewards", {}).get("complete"):
            bad += [file for file in sorted((self.path / "rewards").glob("_*.journal")) if not is_whole_journal(file)]
        has_shards = any(find_shard_names(self.path / stage) for stage in STAGES)
        if not os.path.lexists(self.path / "manifest.json") and has_shards:
            bad.insert(0, self.path / "manifest.json")
        return bad

    def drop(self, file: Path) -> None:
        """Drop one damaged file, so that it is made again; a manifest is restored from its copy."""
        if file.is_dir() and not file.is_symlink():
            set_aside(self.run_dir, file)
        elif JOURNAL.fullmatch(file.name):
            truncate_journal(file)
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

    def clean_up(self) -> None:
        """Remove temporary files of interrupted processes, and add the run to a manifest of an older version.

        Only the owner of the run directory may call it.
        """
        manifest = self.manifest
        if not manifest["stages"] and "settings" not in manifest:
            return
        if "run" not in manifest or self._manifest.read_copy() is None:
            self._manifest.write(manifest)
        for path in [*self.path.glob(".*.tmp"), *self.path.glob("*/.*.tmp")]:
            remove(path)
        for stage in STAGES:
            if self.is_complete(stage):
                self._remove_notes(stage)

    def _remove_notes(self, stage: str) -> None:
        """Remove the notes and journals of a complete stage, whose shards the manifest lists."""
        for kind in ("_*.shard", "_*.journal"):
            for file in (self.path / stage).glob(kind):
                file.unlink()

    def extend(self, stages: Sequence[str], **entries: Any) -> None:
        """Mark complete stages incomplete, because shards will be added, and merge `entries` in the same write."""
        manifest = self.manifest | entries
        for stage in stages:
            info = manifest["stages"][stage]
            info |= {"complete": False, "seconds_before": info["seconds"]}
        self._manifest.write(manifest)

    def reopen(self, stage: str) -> None:
        """Mark a stage incomplete but keep its shards, and delete the stages after it."""
        self.clear(STAGES[STAGES.index(stage) + 1])
        manifest = self.manifest
        if stage in manifest["stages"]:
            info = manifest["stages"][stage]
            # its shards may be replaced, and a kill during that must not look like damage
            info |= {"complete": False, "kept": [*info.get("kept", []), *info.get("shards", [])], "shards": []}
            self._manifest.write(manifest)

    def clear(self, first: str = "responses") -> None:
        """Delete a stage and all after it; `training` has only an entry in the manifest."""
        deleted = ORDER[ORDER.index(first) :]
        manifest = self.manifest
        manifest["stages"] = {name: info for name, info in manifest["stages"].items() if name not in deleted}
        self._manifest.write(manifest)  # first: a stage without an entry is made again
        for stage in deleted:
            shutil.rmtree(self.path / stage, ignore_errors=True)

    def delete(self) -> None:
        """Remove the whole folder, the manifest last."""
        for stage in STAGES:
            shutil.rmtree(self.path / stage, ignore_errors=True)
        shutil.rmtree(self.path, ignore_errors=True)


def _is_complete(manifest: dict[str, Any], stage: str) -> bool:
    """Whether a manifest marks a stage complete."""
    return bool(manifest["stages"].get(stage, {}).get("complete"))


def _read_table(file: Path, columns: Sequence[str] | None) -> pa.Table:
    """Read a shard, or some of its columns."""
    content = read_shard_file(file)
    if content is None:
        raise DamagedStoreError(_describe_damage(file))
    try:
        return pq.read_table(pa.BufferReader(content), columns=None if columns is None else list(columns))
    except pa.ArrowException as error:
        raise DamagedStoreError(_describe_damage(file)) from error


def _describe_damage(file: Path) -> str:
    reason = "its checksum does not match" if os.path.lexists(file) else "it is missing"
    return f"{file} is damaged: {reason}. Run the same command with --repair to make it again."
