"""What is wrong with a round store: files that are no round's, files that are damaged, rounds that are gone."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_pl.store.files import JOURNAL, NOTE, entries, read_checked
from rlhf_pl.store.manifest import COPY
from rlhf_pl.store.round_store import STAGES, DamagedStoreError, Round, RoundStore
from rlhf_pl.store.run_identity import STORE

FOLDERS = ("rounds", "heldout")
MAX_LISTED = 10
REPAIR = (
    "run the same command with --repair: it moves what is not of this run into the folder set_aside, and makes again "
    "what is damaged or missing. Or put the files right yourself."
)


@dataclass(frozen=True)
class Problems:
    """What a check of a run directory's store has found.

    Args:
        strangers: Files and folders that the manifests do not name; nothing reads them.
        damaged: Files that are missing or are not what was written, each with its round.
        missing: Rounds and evaluations that were made and are gone.
    """

    strangers: list[Path]
    damaged: list[tuple[Round, Path]]
    missing: list[Round]

    def __bool__(self) -> bool:
        return bool(self.strangers or self.damaged or self.missing)

    def lines(self) -> list[str]:
        """One for each, such as `damaged or missing: ...`."""
        return [
            *(f"not of this run: {path}" for path in self.strangers),
            *(f"damaged or missing: {file}" for _, file in self.damaged),
            *(f"missing: {stored.path}" for stored in self.missing),
        ]

    def refuse(self, way_out: str = REPAIR) -> None:
        """Raise where there is anything.

        Raises:
            DamagedStoreError: Lists it, and says what `--repair` does.
        """
        if not self:
            return
        lines = self.lines()
        more = f"\n  and {len(lines) - MAX_LISTED} more" if len(lines) > MAX_LISTED else ""
        listed = "\n".join(f"  {line}" for line in lines[:MAX_LISTED])
        raise DamagedStoreError(f"The round store is damaged:\n{listed}{more}\n{way_out}")


def find_problems(
    store: RoundStore, rounds_done: int | None = None, held_out: bool = True, checksums: bool = True
) -> Problems:
    """Look through the whole store.

    Args:
        store: Of a run directory.
        rounds_done: Rounds whose training was begun, as the checkpoint to go on from says; None where there is none:
            then the newest evaluation and round that was trained on tell.
        held_out: Whether evaluations are wanted.
        checksums: Read every file. Otherwise those that are changed inside are found when they are read.
    """
    run = store.run
    if store.noted_run not in (None, run):  # all else would be strange to it
        return Problems([store.run_dir / STORE], [], [])
    foreign = [stored.path for stored in store.everything() if _is_foreign(stored, run)]
    own = [stored for stored in store.everything() if stored.path not in foreign]
    if rounds_done is None:
        reached = [_index(s) if s.is_held_out else _index(s) + 1 for s in own if s.is_held_out or _is_trained_on(s)]
        rounds_done = max(reached, default=0)
    extra = _beyond(own, rounds_done)
    own = [stored for stored in own if stored.path not in extra]
    strangers = [*_unknown_in(store), *foreign, *extra, *(path for stored in own for path in strangers_in(stored, run))]
    damaged = [(stored, file) for stored in own for file in stored.damage(checksums)]
    return Problems(sorted(strangers), damaged, _missing(store, own, rounds_done, held_out))


def strangers_in(stored: Round, run: str | None) -> list[Path]:
    """What is in a round's folder and is neither its own, as one of this run, nor hidden nor a backup."""
    listed = {stage: entries(stored.path / stage) for stage in STAGES}  # before the manifest, which others may write
    found = [path for path in entries(stored.path) if path.name not in ("manifest.json", *STAGES)]
    copy = stored.path / COPY
    found += [copy] if copy.is_dir() else []
    found += [path for stage in STAGES if os.path.lexists(path := stored.path / stage) and not path.is_dir()]
    for stage, paths in listed.items():
        known = stored.known(stage)
        found += [path for path in paths if path.name not in known and not _is_beside(stored, stage, path, run)]
    return found


def _is_beside(stored: Round, stage: str, path: Path, run: str | None) -> bool:
    """Whether a file is a note or a journal of the round's."""
    if stage == "rewards" and JOURNAL.fullmatch(path.name):
        return path.is_file()
    content = read_checked(path) if NOTE.fullmatch(path.name) else None
    return content is not None and stored.is_own(content, run)


def _is_foreign(stored: Round, run: str | None) -> bool:
    """Whether a folder is another run's or round's: its manifest is, and the copy does not say otherwise."""
    contents = [read_checked(stored.path / name) for name in ("manifest.json", COPY)]
    known = [stored.is_own(content, run) for content in contents if content is not None]
    return bool(known) and not any(known)


def _unknown_in(store: RoundStore) -> list[Path]:
    """What lies between the rounds, or in the place of their folder."""
    known = {stored.path for stored in store.everything()}
    folders = [store.run_dir / name for name in FOLDERS]
    instead = [folder for folder in folders if os.path.lexists(folder) and not folder.is_dir()]
    instead += [file for file in [store.run_dir / STORE] if file.is_dir()]
    return [*instead, *(path for folder in folders for path in entries(folder) if path not in known)]


def _beyond(own: list[Round], rounds_done: int) -> list[Path]:
    """Rounds that can't have been made yet, as one before them has not, and evaluations of policies to come."""
    there = {_index(stored) for stored in own if not stored.is_held_out}
    reached = rounds_done
    while reached in there:
        reached += 1
    return [stored.path for stored in own if _index(stored) > reached]


def _missing(store: RoundStore, own: list[Round], rounds_done: int, held_out: bool) -> list[Round]:
    """What must have been made: every round up to here, and the evaluations of those that had held-out prompts."""
    given_up, there = store.given_up, {stored.name for stored in own if entries(stored.path)}
    wanted = [store.round(index) for index in range(rounds_done)]
    if held_out:
        rounds = [s for s in own if not s.is_held_out and _index(s) < rounds_done]
        wanted += [store.held_out(_index(s)) for s in rounds if _content(s).get("prompts", {}).get("held_out")]
    return [stored for stored in wanted if stored.name not in there and stored.name not in given_up]


def _content(stored: Round) -> dict[str, Any]:
    """The manifest; nothing where it is damaged."""
    try:
        return stored.manifest
    except DamagedStoreError:
        return {}


def _is_trained_on(stored: Round) -> bool:
    return bool(_content(stored).get("stages", {}).get("training", {}).get("complete"))


def _index(stored: Round) -> int:
    return int(stored.path.name)
