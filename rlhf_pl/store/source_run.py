"""Rounds of another run, which are read and never written: the run may be in progress."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rlhf_pl.store.files import DamagedStoreError, read_shard_file
from rlhf_pl.store.round_store import Round, RoundStore
from rlhf_pl.utils.errors import InputError

IDENTITY = ("policy", "policy_step", "weights", "seed", "sampler")  # of what sampled a round's responses
COPIED = ("responses", "rewards")


class SourceRound:
    """A complete round of another run: its responses and rewards, and what says where they came from.

    Args:
        stored: The round.

    Raises:
        InputError: Its manifest is damaged.
    """

    def __init__(self, stored: Round) -> None:
        self.stored = stored
        try:
            self.manifest: dict[str, Any] = stored.manifest
        except DamagedStoreError as error:
            raise as_foreign(error) from error

    @property
    def is_scored(self) -> bool:
        """Whether its responses and rewards are complete."""
        return all(self.is_complete(stage) for stage in COPIED)

    def is_complete(self, stage: str) -> bool:
        return bool(self.manifest["stages"].get(stage, {}).get("complete"))

    def info(self, stage: str) -> dict[str, Any]:
        """The counts of a complete stage, without its files and times."""
        info = self.manifest["stages"][stage]
        return {k: v for k, v in info.items() if k not in ("complete", "shards", "kept", "lost", "tokens_per_s")}

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the responses, as far as the manifest has them."""
        return self.manifest.get("settings", {}).get("responses", {})

    @property
    def made_by(self) -> dict[str, Any]:
        """The policy and the sampler of the responses; those of the first run, where this one has copied them too."""
        made_by = self.manifest.get("rounds_from", self.settings)
        return {name: made_by.get(name) for name in IDENTITY}

    def shards(self, stage: str) -> list[str]:
        """Names of a complete stage's files."""
        info = self.manifest["stages"].get(stage, {})
        return list(info.get("shards") or [file.name for file in self.stored.shards(stage).values()])

    def read_bytes(self, stage: str, name: str) -> bytes:
        """Read a file, compared with its checksum.

        Raises:
            InputError: It is missing, was changed, or can't be read.
        """
        file = self.stored.path / stage / name
        try:
            content = read_shard_file(file)
        except OSError as error:
            raise InputError(f"`--rounds_from`: {file} can't be read: {error.strerror}.") from error
        if content is None:
            reason = "its checksum does not match" if file.exists() else "it is missing"
            raise InputError(f"`--rounds_from`: {file} is damaged: {reason}. {_REMEDY}")
        return content

    def read(self, stage: str) -> pa.Table:
        """Read all rows of a complete stage."""
        return pa.concat_tables(self.tables(stage))

    def tables(self, stage: str) -> Iterator[pa.Table]:
        """Read a complete stage file by file, to limit memory."""
        for name in self.shards(stage):
            try:
                yield pq.read_table(pa.BufferReader(self.read_bytes(stage, name)))
            except pa.ArrowException as error:
                raise InputError(f"`--rounds_from`: {self.stored.path / stage / name} is damaged. {_REMEDY}") from error


class SourceRun:
    """The rounds of another run's directory.

    Args:
        run_dir: The directory.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.run_dir = Path(run_dir)
        self._store = RoundStore(run_dir)

    def round(self, index: int) -> SourceRound:
        """Round `index`."""
        return SourceRound(self._store.round(index))

    def count(self) -> int:
        """Number of rounds, from the first on, whose responses and rewards are complete."""
        count = 0
        while self._store.round(count).path.is_dir() and self.round(count).is_scored:
            count += 1
        return count

    @property
    def identity(self) -> str:
        """Id of the run. For directories of versions without ids a hash of the first round's files."""
        names = ",".join(self.round(0).shards("responses"))
        return self._store.run or hashlib.sha256(names.encode()).hexdigest()[:16]

    def check(self) -> None:
        """Raise if there is no round to take.

        Raises:
            InputError: The directory does not exist, or its first round is missing or not complete.
        """
        where = f"`--rounds_from`: {str(self.run_dir)!r}"
        if not self.run_dir.is_dir():
            raise InputError(f"{where} is not a folder. Give the run directory of an earlier run.")
        existing = self._store.rounds()
        if not existing:
            raise InputError(f"{where} holds no rounds: it is not a run directory, or its run has not begun one yet.")
        if 0 not in existing:
            raise InputError(f"{where} lacks its first round; the first one is {existing[min(existing)].path}.")
        if self.count() == 0:
            raise InputError(f"{where}: responses and rewards of its first round are not complete yet.")


_REMEDY = "Restore it, or run that run's own command with --repair."


def as_foreign(error: DamagedStoreError) -> InputError:
    """The same error with the remedy for a round of another run."""
    return InputError(f"`--rounds_from`: {str(error).partition(' Run the same command')[0]} {_REMEDY}")
