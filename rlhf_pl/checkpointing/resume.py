"""Where a run resumes: from its newest checkpoint, or from the one before the last round if that is trained again."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rlhf_pl.checkpointing.checkpoints import (
    FOLDER,
    Progress,
    checkpoint_files,
    find_resume_files,
    is_whole,
    link_last,
    read_progress,
    supersede,
)
from rlhf_pl.store.provenance import REDONE, StageSettings, find_first_change, list_differences
from rlhf_pl.store.round_store import ORDER, DamagedStoreError, Round, RoundStore
from rlhf_pl.utils.console import console
from rlhf_pl.utils.errors import InputError

_DATA_HASHES = ("columns", "messages")  # not compared: the rows are not read yet


@dataclass(frozen=True)
class ResumePoint:
    """Where a run resumes.

    Args:
        checkpoint: The checkpoint; None to start from the beginning.
        commit: Moves checkpoints of the training to be repeated aside. Called after the run's checks.
    """

    checkpoint: Path | None
    commit: Callable[[], None] = lambda: None


def find_resume_point(
    run_dir: str, downstream: StageSettings | None, max_epochs: int | None, accept_changes: bool
) -> ResumePoint:
    """Find the checkpoint to resume from.

    If the reward, the selector or the training settings have changed, the current round is trained again from its
    start: the round in training, or the last one of a finished run. Its checkpoints are moved aside.

    Args:
        run_dir: The run directory.
        downstream: The current settings by stage; None if the run has no rounds.
        max_epochs: Number of rounds of the run.
        accept_changes: Whether to keep the current round's training and apply new settings from here on.

    Raises:
        InputError: The checkpoint before that round is missing, or there are checkpoints of another run.
    """
    files = find_resume_files(run_dir)
    broken = set(checkpoint_files(run_dir)) - set(files)
    while files and not is_whole(newest := list(files)[-1]):
        broken.add(newest)
        del files[newest]
    for file in sorted(broken):
        console.print(f"{file} is damaged; it is skipped.", soft_wrap=True)
    if not files:
        if broken:
            console.print(
                "No other checkpoint is left: the run trains again from its start, on what is stored of its rounds.",
                soft_wrap=True,
            )
        return ResumePoint(None)
    _refuse_other_runs(files, RoundStore(run_dir).run)
    newest, progress = list(files.items())[-1]
    unchanged = ResumePoint(newest, partial(link_last, newest))  # a killed process may not have made the link
    if downstream is None or accept_changes:
        return unchanged
    index = _get_current_round(progress, max_epochs)
    stored = RoundStore(run_dir).round(index) if index is not None else None
    try:
        settings = None if stored is None else stored.manifest.get("settings")
    except DamagedStoreError:  # reported or repaired before the round is used
        settings = None
    if stored is None or settings is None:
        return unchanged
    before, now = settings, Round.as_stored(downstream)
    before = {stage: {k: v for k, v in before[stage].items() if k not in _DATA_HASHES} for stage in before}
    changed = find_first_change(before, now, ORDER[1:])
    if changed is None:
        return unchanged
    starts = (f for f, p in files.items() if p.rounds_done == index and not p.is_inside_round)
    start = next(filter(is_whole, reversed(list(starts))), None)
    lines = "; ".join(list_differences(before[changed], now[changed]))
    if start is None and index != 0:
        raise InputError(
            f"Changed since {stored.path} was trained on: {lines}. To train on it again, the checkpoint before it is "
            f"needed, which is no longer in {Path(run_dir) / FOLDER}: an ended run keeps it with "
            "--checkpoint.keep_rounds 2. Train further rounds with the new settings (--trainer.max_epochs "
            f"{progress.rounds_done + 1}), give this run a directory of its own (--trainer.default_root_dir DIR), or "
            "keep the trained policy with --accept_changes."
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
    """The resume point at a checkpoint that the user has chosen. `commit` moves later checkpoints of the run aside.

    Raises:
        InputError: The checkpoint can't be read.
    """
    progress = read_progress(checkpoint)
    if progress is None:
        raise InputError(f"`ckpt_path`: {str(checkpoint)!r} is not a readable checkpoint of this program.")
    later = [f for f, p in find_resume_files(run_dir).items() if p > progress and f.resolve() != checkpoint.resolve()]

    def commit() -> None:
        if kept := supersede(later):
            console.print(f"Later training is kept in {kept}.", soft_wrap=True)

    return ResumePoint(checkpoint, commit)


def _refuse_other_runs(files: dict[Path, Progress], run: str | None) -> None:
    """Refuse checkpoints of another run, which a merged or restored directory may hold."""
    others = [file for file, progress in files.items() if None not in (run, progress.run) and progress.run != run]
    if others:
        raise InputError(
            f"{', '.join(map(str, others))} belongs to another run than the rounds beside it. Move it out of "
            f"{FOLDER}, or name the checkpoint to resume from (--ckpt_path FILE)."
        )


def _get_current_round(progress: Progress, max_epochs: int | None) -> int | None:
    """Index of the round that is trained again if its settings have changed; None if no round has begun."""
    if progress.is_inside_round:
        return progress.rounds_done
    is_finished = max_epochs is not None and 0 <= max_epochs <= progress.rounds_done
    return progress.rounds_done - 1 if is_finished and progress.rounds_done > 0 else None
