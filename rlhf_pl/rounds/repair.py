"""`--repair`: regenerates exactly the damaged files of the round store, and moves foreign files aside."""

from functools import partial
from pathlib import Path

from rlhf_pl.checkpointing.progress import is_inside_round, rounds_done
from rlhf_pl.rounds.maker import RoundMaker
from rlhf_pl.store.check import find_problems
from rlhf_pl.store.files import set_aside
from rlhf_pl.store.provenance import POLICY_KEYS, keep_extras, list_differences
from rlhf_pl.store.round_store import STAGES, DamagedStoreError, Round, RoundStore
from rlhf_pl.utils.console import console


def repair(maker: RoundMaker) -> None:
    """Regenerate damaged files and missing rounds, each from the policy that it came from.

    Raises:
        DamagedStoreError: That policy is gone, and the round is still needed.
    """
    store, started = maker.data.store, rounds_done(maker.trainer) + is_inside_round(maker.trainer)
    held_out = bool(maker.data.val_prompts)

    def clear_up() -> tuple[list[Path], list[Path]]:
        """Drop damaged files; return the rounds that they were in, and those that are missing altogether."""
        move_aside(store, find_problems(store, started, held_out).foreign)
        problems = find_problems(store, started, held_out)  # again: a manifest's copy may count now
        for stored, file in problems.damaged:
            _print(f"Repairing {file}")
            stored.drop(file)
        return [stored.path for stored, _ in problems.damaged], [stored.path for stored in problems.missing]

    damaged, missing = maker.ranks.run_on_rank_zero(clear_up)
    for path in dict.fromkeys(damaged):
        _complete_round(maker, Round(path))
    for path in missing:
        _remake_round(maker, Round(path))


def move_aside(store: RoundStore, foreign_files: list[Path]) -> None:
    """Move files that are not the run's out of its store."""
    for path in foreign_files:
        _print(f"Not part of this run: {path} is now {set_aside(store.run_dir, path)}")


def _complete_round(maker: RoundMaker, stored: Round) -> None:
    """Regenerate the missing files of a round."""
    if not maker.ranks.broadcast(bool(stored.manifest.get("settings"))) and not _restore_manifest(maker, stored):
        maker.ranks.run_on_rank_zero(stored.delete)
        return
    before = stored.manifest["settings"]
    now = keep_extras(before, Round.as_stored(maker.stamps.settings(stored)))
    if list_differences(before["responses"], now["responses"], *POLICY_KEYS):
        raise DamagedStoreError(f"{stored.path} can't be repaired: it was made with other settings than these.")
    begun = [name for name in STAGES if name in stored.manifest["stages"] or stored.shards(name)]
    stages = maker.ranks.broadcast(begun)
    if "responses" in stages:
        maker.make_stages(stored, partial(maker.past_policy, stored), pairs="pairs" in stages)


def _remake_round(maker: RoundMaker, stored: Round) -> None:
    """Remake a round that is gone entirely, or record that the run continues without it."""
    _print(f"Repairing {stored.path}")
    needed = not stored.is_held_out and int(stored.path.name) >= rounds_done(maker.trainer)
    try:
        if _restore_manifest(maker, stored):
            pairs = not stored.is_held_out or maker.has_held_out_pairs
            maker.make_stages(stored, partial(maker.past_policy, stored), pairs=pairs)
            return
        reason = "no manifest says which policy sampled its responses."
    except DamagedStoreError as error:
        reason = str(error)
    if needed:
        raise DamagedStoreError(f"{stored.path} is missing, and the run needs it: {reason}")

    def continue_without() -> None:
        stored.delete()
        maker.data.store.give_up(stored)

    maker.ranks.run_on_rank_zero(continue_without)
    _print(f"{stored.path} is lost; the run has trained on it and continues without it.")


def _restore_manifest(maker: RoundMaker, stored: Round) -> bool:
    """Restore a manifest whose copy is lost too, from its sibling: round and evaluation N have the same policy.

    Returns:
        Whether the sibling names the policy.
    """
    number, store = int(stored.path.name), maker.data.store
    sibling = store.round(number) if stored.is_held_out else store.held_out(number)
    made_by = sibling.manifest.get("settings", {}).get("responses")
    if made_by is None:
        return False
    maker.reconcile(stored, made_by)
    if not stored.is_held_out and number < rounds_done(maker.trainer):
        maker.ranks.run_on_rank_zero(lambda: stored.complete("training", seconds=0.0, loss=None, kl=None))
    return True


def _print(text: str) -> None:
    console.print(text, soft_wrap=True)
