"""The round store: everything a round produced, as Parquet shards under a manifest."""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA_VERSION = 1
STAGES = ("responses", "rewards", "pairs", "logps")


class Round:
    """One folder of the store, such as `rounds/0002` or `heldout/0003`.

    A shard is written under a temporary name and renamed, so a file that exists is whole. A stage is complete when
    the manifest says so; whatever died before goes on from the shards that exist.

    Args:
        path: The folder; created on the first write.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def manifest(self) -> dict[str, Any]:
        """Settings, counts, times and per-stage completeness; empty stages if nothing is there yet."""
        file = self.path / "manifest.json"
        if not file.exists():
            return {"schema_version": SCHEMA_VERSION, "stages": {}}
        return json.loads(file.read_text())

    def update(self, **entries: Any) -> None:
        """Merge `entries` into the manifest."""
        self._write_json("manifest.json", self.manifest | entries)

    def complete(self, stage: str, **info: Any) -> None:
        """Mark `stage` complete, with its counts, settings and times."""
        manifest = self.manifest
        manifest["stages"][stage] = {"complete": True, **info}
        self._write_json("manifest.json", manifest)

    def is_complete(self, stage: str) -> bool:
        return bool(self.manifest["stages"].get(stage, {}).get("complete"))

    def info(self, stage: str) -> dict[str, Any]:
        """What `complete` recorded."""
        return self.manifest["stages"][stage]

    def has_shard(self, stage: str, index: int) -> bool:
        return self._shard(stage, index).exists()

    def shards(self, stage: str) -> list[int]:
        """Numbers of the shards that are there, ascending."""
        return sorted(int(file.stem) for file in (self.path / stage).glob("*.parquet"))

    def write_shard(self, stage: str, index: int, table: pa.Table) -> None:
        target = self._shard(stage, index)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_suffix(".tmp")
        with temporary.open("wb") as file:
            pq.write_table(table, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)

    def read(self, stage: str) -> pa.Table:
        """All rows of a stage, in shard order."""
        return pa.concat_tables([self.read_shard(stage, index) for index in self.shards(stage)])

    def read_shard(self, stage: str, index: int) -> pa.Table:
        return pq.read_table(self._shard(stage, index), partitioning=None)  # a folder may be called lr=1e-5

    def _shard(self, stage: str, index: int) -> Path:
        return self.path / stage / f"{index:05d}.parquet"

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        temporary = self.path / f"{name}.tmp"
        with temporary.open("w") as file:
            json.dump(content, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path / name)


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
