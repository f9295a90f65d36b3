"""Where a run goes on: its newest checkpoint, or the one before the last round if that is to be trained again."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rlhf_pl.checkpointing.checkpoints import (
    FOLDER,
    Progress,
    checkpoint_files,
    is_whole,
    link_last,
    progress_of_files,
    read_progress,
    supersede,
)
from rlhf_pl.store.provenance import REDONE, StageSettings, differences, first_change
from rlhf_pl.store.round_store import ORDER, DamagedStoreError, Round, RoundStore
from rlhf_pl.utils.console import console
from rlhf_pl.utils.errors import InputError

_OF_DATA = ("columns", "messages")  # hashes of rows, which are not read yet


@dataclass(frozen=True)
class ResumePoint:
    """Where to go on.

    Args:
        checkpoint: None for a start from the beginning.
        commit: Puts aside what is to be trained again; to be called once nothing can be refused any more.
    """

    checkpoint: Path | None
    commit: Callable[[], None] = lambda: None


def find_resume_point(
    run_dir: str, downstream: StageSettings | None, max_epochs: int | None, accept_changes: bool
) -> ResumePoint:
    """The checkpoint to go on from.

    If the reward, the selector or the training settings have changed, the round at hand goes back to its start: the
    one in training, or the last one of a finished run. What was trained with the old settings is put aside.

    Args:
        run_dir: The run directory.
        downstream: The present settings by stage; None if nothing is prepared in this run.
        max_epochs: Rounds wanted.
        accept_changes: Keep what is trained, and let new settings count from here on.

    Raises:
        InputError: The checkpoint before that round is gone, or there are checkpoints of another run.
    """
    files = progress_of_files(run_dir)
    broken = set(checkpoint_files(run_dir)) - set(files)
    while files and not is_whole(newest := list(files)[-1]):
        broken.add(newest)
        del files[newest]
    for file in sorted(broken):
        console.print(f"{file} is damaged; going on without it.", soft_wrap=True)
    if not files:
        return ResumePoint(None)
    _refuse_others(files, RoundStore(run_dir).run)
    newest, progress = list(files.items())[-1]
    unchanged = ResumePoint(newest, partial(link_last, newest))  # a process that was killed may have linked none
    if downstream is None or accept_changes:
        return unchanged
    index = _round_at_hand(progress, max_epochs)
    stored = RoundStore(run_dir).round(index) if index is not None else None
    try:
        settings = None if stored is None else stored.manifest.get("settings")
    except DamagedStoreError:  # which is reported, or repaired, before the round is used
        settings = None
    if stored is None or settings is None:
        return unchanged
    before, now = settings, Round.as_stored(downstream)
    before = {stage: {k: v for k, v in before[stage].items() if k not in _OF_DATA} for stage in before}
    changed = first_change(before, now, ORDER[1:])
    if changed is None:
        return unchanged
    starts = (f for f, p in files.items() if p.rounds_done == index and not p.inside_round)
    start = next(filter(is_whole, reversed(list(starts))), None)
    lines = "; ".join(differences(before[changed], now[changed]))
    if start is None and index != 0:
        raise InputError(
            f"Changed since {stored.path} was trained on: {lines}. To train on it again, the checkpoint before it is "
            f"needed, and it is gone from {Path(run_dir) / FOLDER} (see `checkpoint.keep_rounds`). Give this run a "
            "directory of its own (--trainer.default_root_dir DIR), or give --accept_changes to keep what is trained."
        )
    later = [f for f, p in files.items() if start is None or p > files[start]]

    def commit() -> None:
        kept = supersede(later)
        if start is not None:
            link_last(start)
        else:
            (Path(run_dir) / FOLDER / "last.ckpt").unlink(missing_ok=True)
        stored.clear(changed)
        console.print(
            f"Changed: {lines}. Round {int(stored.path.name) + 1} is {REDONE[changed]} again, from the policy at its "
            f"start; the training with the old settings is kept in {kept}.",
            soft_wrap=True,
        )

    return ResumePoint(start, commit)


def chosen_resume_point(run_dir: str, checkpoint: Path) -> ResumePoint:
    """The checkpoint a user has named. Later ones of the same run would be newer than what follows: they go aside.

    Raises:
        InputError: It can't be read.
    """
    progress = read_progress(checkpoint)
    if progress is None:
        raise InputError(f"`ckpt_path`: {str(checkpoint)!r} is no readable checkpoint of this program.")
    later = [f for f, p in progress_of_files(run_dir).items() if p > progress and f.resolve() != checkpoint.resolve()]

    def commit() -> None:
        if kept := supersede(later):
            console.print(f"Later training is kept in {kept}.", soft_wrap=True)

    return ResumePoint(checkpoint, commit)


def _refuse_others(files: dict[Path, Progress], run: str | None) -> None:
    """Refuse checkpoints of another run, which a merged or restored directory may hold."""
    others = [file for file, progress in files.items() if None not in (run, progress.run) and progress.run != run]
    if others:
        raise InputError(
            f"{', '.join(map(str, others))} belongs to another run than the rounds beside it. Move it out of "
            f"{FOLDER}, or name the checkpoint to go on from (--ckpt_path FILE)."
        )


def _round_at_hand(progress: Progress, max_epochs: int | None) -> int | None:
    """The round that has to go back to its start if its settings have changed; None if none was begun."""
    if progress.inside_round:
        return progress.rounds_done
    finished = max_epochs is not None and 0 <= max_epochs <= progress.rounds_done
    return progress.rounds_done - 1 if finished and progress.rounds_done > 0 else None
