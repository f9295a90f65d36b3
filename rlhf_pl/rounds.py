"""The round store: everything a round produced, as Parquet shards under a manifest."""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rlhf_pl.disk import write_atomically
from rlhf_pl.errors import InputError
from rlhf_pl.secrets import redacted

SCHEMA_VERSION = 2
_COPY = ".manifest.copy.json"
STAGES = ("responses", "rewards", "pairs", "logps")
ORDER = (*STAGES, "training")  # what a later one is made of comes first


class DamagedStoreError(InputError):
    """A file of the round store is not what was written."""


class Round:
    """One folder of the store, such as `rounds/0002` or `heldout/0003`.

    A shard is `<stage>/<number>-<checksum>.parquet`, written under a temporary name and renamed: a file that exists is
    whole, and its name tells whether it still is. A stage is complete when the manifest says so and lists its shards;
    whatever died before goes on from the shards that exist.

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
    def is_held_out(self) -> bool:
        """Whether this is an evaluation on the held-out prompts."""
        return self.path.parent.name == "heldout"

    @property
    def manifest(self) -> dict[str, Any]:
        """Settings, counts, times and per-stage completeness; empty stages if nothing is there yet.

        Raises:
            DamagedStoreError: The file is damaged.
        """
        file = self.path / "manifest.json"
        if not file.exists():
            return {"schema_version": SCHEMA_VERSION, "stages": {}}
        content = _read_manifest(file)
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
        return content

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

    def is_complete(self, stage: str) -> bool:
        return bool(self.manifest["stages"].get(stage, {}).get("complete"))

    def info(self, stage: str) -> dict[str, Any]:
        """What `complete` recorded."""
        return self.manifest["stages"][stage]

    def shards(self, stage: str) -> dict[int, Path]:
        """The shards that are there, by number, ascending."""
        files = sorted((self.path / stage).glob("[0-9]*-*.parquet"))
        return {int(file.name.split("-")[0]): file for file in files}

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
        for old in (self.path / stage).glob(f"{number:05d}-*.parquet"):  # damaged, or of another policy
            old.unlink()
        target = self.path / stage / f"{number:05d}-{_checksum(content)}.parquet"
        write_atomically(target, lambda file: file.write(content), content.size)

    def read(self, stage: str) -> pa.Table:
        """All rows of a stage, in shard order."""
        return pa.concat_tables([self.read_shard(stage, number) for number in self.shards(stage)])

    def read_shard(self, stage: str, number: int) -> pa.Table:
        """One shard.

        Raises:
            DamagedStoreError: Its content does not match its checksum.
        """
        file = self.shards(stage)[number]
        content = pa.py_buffer(file.read_bytes())
        if not _matches(file, content):
            raise DamagedStoreError(_damaged(file))
        return pq.read_table(pa.BufferReader(content))

    def damage(self) -> list[Path]:
        """Files that are damaged or missing: the manifest first, then shards."""
        bad = []
        try:
            manifest = self.manifest
        except DamagedStoreError:
            bad.append(self.path / "manifest.json")
            manifest = _read_manifest(self.path / _COPY) or {"stages": {}}
        for stage in STAGES:
            there = self.shards(stage)
            damaged = [f for f in there.values() if not _matches(f, f.read_bytes())]
            info = manifest["stages"].get(stage, {})
            listed = [*info.get("shards", []), *info.get("lost", [])]  # lost: to a repair that did not finish
            missing = [self.path / stage / name for name in listed if not (self.path / stage / name).exists()]
            bad += sorted({*damaged, *missing})
        if not (self.path / "manifest.json").exists() and any(self.shards(stage) for stage in STAGES):
            bad.insert(0, self.path / "manifest.json")
        return bad

    def drop(self, file: Path) -> None:
        """Forget one damaged file, so that it is made again; its neighbours stay. The manifest comes from its copy."""
        file.unlink(missing_ok=True)
        if file.name == "manifest.json":
            if (copy := _read_manifest(self.path / _COPY)) is not None:
                self._write_manifest(copy)
            return
        manifest = self.manifest
        stage = manifest["stages"].get(file.parent.name)
        if stage is not None:
            stage["complete"] = False
            stage["lost"] = [*stage.get("lost", []), file.name]
            stage["shards"] = [name for name in stage.get("shards", []) if name != file.name]
            self._write_manifest(manifest)

    def reopen(self, stage: str) -> None:
        """Let `stage` go through its shards again, and make all after it anew."""
        self.clear(STAGES[STAGES.index(stage) + 1])
        manifest = self.manifest
        if stage in manifest["stages"]:
            # its shards may get other names, and a kill in between is no damage
            manifest["stages"][stage] |= {"complete": False, "shards": []}
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
        text = json.dumps({**content, "checksum": _manifest_checksum(content)}, indent=2)
        # The copy first: what is killed before the manifest is written is done again, and clears up behind itself.
        for name in (_COPY, "manifest.json"):
            write_atomically(self.path / name, lambda file: file.write(text.encode()))


class RoundStore:
    """The rounds of a run directory, and the evaluations on held-out prompts beside them.

    Args:
        run_dir: The run directory.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.run_dir = Path(run_dir)

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

    def damage(self) -> list[tuple[Round, Path]]:
        """Every damaged or missing file, with its round."""
        everything = [*self.rounds().values(), *self.evaluations().values()]
        return [(stored, file) for stored in everything for file in stored.damage()]


def _numbered(folder: Path) -> Iterator[tuple[int, Round]]:
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if path.name.isdigit() and path.is_dir():
                yield int(path.name), Round(path)


def _checksum(content: Any) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _matches(file: Path, content: Any) -> bool:
    return file.stem.split("-", 1)[1] == _checksum(content)


def _manifest_checksum(content: dict[str, Any]) -> str:
    return _checksum(json.dumps(content, sort_keys=True).encode())


def _read_manifest(file: Path) -> dict[str, Any] | None:
    """The manifest's content, or None if it is damaged."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        checksum = content.pop("checksum")
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return None
    return content if checksum == _manifest_checksum(content) else None


def _damaged(file: Path) -> str:
    return f"{file} is damaged: its checksum does not match. The same command with --repair makes it again."
