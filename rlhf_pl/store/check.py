"""Finds foreign files, damaged files and missing rounds in a round store."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_pl.store.files import JOURNAL, NOTE, list_entries, read_checked
from rlhf_pl.store.manifest import COPY
from rlhf_pl.store.round_store import STAGES, DamagedStoreError, Round, RoundStore
from rlhf_pl.store.run_identity import STORE

FOLDERS = ("rounds", "heldout")
MAX_LISTED = 10
REPAIR = (
    "Run the same command with --repair: it moves files that are not of this run into the folder set_aside, and makes "
    "damaged or missing files again. Or restore the files yourself."
)


@dataclass(frozen=True)
class Problems:
    """The problems of the store of a run directory.

    Args:
        foreign: Files and folders that no manifest lists; they are never read.
        damaged: Files that are missing or were changed, each with its round.
        missing: Rounds and evaluations that were made and are missing.
    """

    foreign: list[Path]
    damaged: list[tuple[Round, Path]]
    missing: list[Round]

    def __bool__(self) -> bool:
        return bool(self.foreign or self.damaged or self.missing)

    def lines(self) -> list[str]:
        """A line for each problem, e.g. `damaged or missing: FILE`."""
        return [
            *(f"not of this run: {path}" for path in self.foreign),
            *(f"damaged or missing: {file}" for _, file in self.damaged),
            *(f"missing: {stored.path}" for stored in self.missing),
        ]

    def refuse(self, remedy: str = REPAIR) -> None:
        """Raise if there is a problem.

        Args:
            remedy: The last sentences of the error.

        Raises:
            DamagedStoreError: Lists the problems and the remedy.
        """
        if not self:
            return
        lines = self.lines()
        more = f"\n  and {len(lines) - MAX_LISTED} more" if len(lines) > MAX_LISTED else ""
        listed = "\n".join(f"  {line}" for line in lines[:MAX_LISTED])
        raise DamagedStoreError(f"The round store is damaged:\n{listed}{more}\n{remedy}")


def find_problems(
    store: RoundStore, rounds_done: int | None = None, held_out: bool = True, checksums: bool = True
) -> Problems:
    """Find all problems of a store.

    Args:
        store: The store.
        rounds_done: Number of rounds whose training was started, according to the checkpoint to resume from. None
            without a checkpoint: derived from the newest evaluation and the newest round that was trained on.
        held_out: Whether missing evaluations are a problem.
        checksums: Verify the checksums of all files. Otherwise changes inside a file are found when it is read.
    """
    run = store.run
    if store.recorded_run not in (None, run):  # by this file, all rounds would be foreign
        return Problems([store.run_dir / STORE], [], [])
    foreign_rounds = [stored.path for stored in store.all_rounds() if _is_foreign(stored, run)]
    own = [stored for stored in store.all_rounds() if stored.path not in foreign_rounds]
    if rounds_done is None:
        reached = [_index(s) if s.is_held_out else _index(s) + 1 for s in own if s.is_held_out or _is_trained_on(s)]
        rounds_done = max(reached, default=0)
    extra = _find_future_rounds(own, rounds_done)
    own = [stored for stored in own if stored.path not in extra]
    foreign = [*_find_foreign_entries(store), *foreign_rounds, *extra]
    foreign += [path for stored in own for path in find_foreign_files(stored, run)]
    damaged = [(stored, file) for stored in own for file in stored.find_damage(checksums)]
    return Problems(sorted(foreign), damaged, _find_missing(store, own, rounds_done, held_out))


def find_foreign_files(stored: Round, run: str | None) -> list[Path]:
    """Files and folders in a round's folder that are not of this round and run, without hidden files and backups."""
    listed = {
        stage: list_entries(stored.path / stage) for stage in STAGES
    }  # before the manifest, which others may write
    found = [path for path in list_entries(stored.path) if path.name not in ("manifest.json", *STAGES)]
    copy = stored.path / COPY
    found += [copy] if copy.is_dir() else []
    found += [path for stage in STAGES if os.path.lexists(path := stored.path / stage) and not path.is_dir()]
    for stage, paths in listed.items():
        known = stored.known(stage)
        found += [
            path for path in paths if path.name not in known and not _is_note_or_journal(stored, stage, path, run)
        ]
    return found


def _is_note_or_journal(stored: Round, stage: str, path: Path, run: str | None) -> bool:
    """Whether a file is a note or a journal of the round."""
    if stage == "rewards" and JOURNAL.fullmatch(path.name):
        return path.is_file()
    content = read_checked(path) if NOTE.fullmatch(path.name) else None
    return content is not None and stored.is_own(content, run)


def _is_foreign(stored: Round, run: str | None) -> bool:
    """Whether a folder is of another run or round, by its manifest and the copy of it."""
    contents = [read_checked(stored.path / name) for name in ("manifest.json", COPY)]
    known = [stored.is_own(content, run) for content in contents if content is not None]
    return bool(known) and not any(known)


def _find_foreign_entries(store: RoundStore) -> list[Path]:
    """Entries beside the rounds, and files in place of the folders of rounds."""
    known = {stored.path for stored in store.all_rounds()}
    folders = [store.run_dir / name for name in FOLDERS]
    instead = [folder for folder in folders if os.path.lexists(folder) and not folder.is_dir()]
    instead += [file for file in [store.run_dir / STORE] if file.is_dir()]
    return [*instead, *(path for folder in folders for path in list_entries(folder) if path not in known)]


def _find_future_rounds(own: list[Round], rounds_done: int) -> list[Path]:
    """Rounds and evaluations that can't exist yet, because an earlier round is missing."""
    existing = {_index(stored) for stored in own if not stored.is_held_out}
    reached = rounds_done
    while reached in existing:
        reached += 1
    return [stored.path for stored in own if _index(stored) > reached]


def _find_missing(store: RoundStore, own: list[Round], rounds_done: int, held_out: bool) -> list[Round]:
    """The missing ones of the rounds up to `rounds_done`, and of the evaluations of those with held-out prompts."""
    given_up, existing = store.given_up, {stored.name for stored in own if list_entries(stored.path)}
    expected = [store.round(index) for index in range(rounds_done)]
    if held_out:
        rounds = [s for s in own if not s.is_held_out and _index(s) < rounds_done]
        expected += [store.held_out(_index(s)) for s in rounds if _read_manifest(s).get("prompts", {}).get("held_out")]
    return [stored for stored in expected if stored.name not in existing and stored.name not in given_up]


def _read_manifest(stored: Round) -> dict[str, Any]:
    """The manifest; empty if it is damaged."""
    try:
        return stored.manifest
    except DamagedStoreError:
        return {}


def _is_trained_on(stored: Round) -> bool:
    return bool(_read_manifest(stored).get("stages", {}).get("training", {}).get("complete"))


def _index(stored: Round) -> int:
    return int(stored.path.name)
