"""`--repair`: damaged files of the round store are made again, and just they; what is not of the run is moved aside."""

from functools import partial
from pathlib import Path

from rlhf_pl.checkpointing.progress import inside_round, rounds_done
from rlhf_pl.rounds.maker import RoundMaker
from rlhf_pl.store.check import find_problems
from rlhf_pl.store.files import set_aside
from rlhf_pl.store.provenance import OF_POLICY, differences
from rlhf_pl.store.round_store import STAGES, DamagedStoreError, Round, RoundStore
from rlhf_pl.utils.console import console


def repair(maker: RoundMaker) -> None:
    """Make damaged files and missing rounds again, each from the policy that it came from.

    Raises:
        DamagedStoreError: The policy that answered is gone, and the round is still needed.
    """
    store, begun = maker.data.store, rounds_done(maker.trainer) + inside_round(maker.trainer)
    held_out = bool(maker.data.val_prompts)

    def clear_up() -> tuple[list[Path], list[Path]]:
        """What has to be made again, and what is missing altogether."""
        strangers = find_problems(store, begun, held_out).strangers
        move_aside(store, strangers)
        found = find_problems(store, begun, held_out)  # a manifest's copy may count now
        for stored, file in found.damaged:
            _say(f"Repairing {file}")
            stored.drop(file)
        return [stored.path for stored, _ in found.damaged], [stored.path for stored in found.missing]

    damaged, missing = maker.ranks.run_on_rank_zero(clear_up)
    for path in dict.fromkeys(damaged):
        _mend(maker, Round(path))
    for path in missing:
        _replace(maker, Round(path))


def move_aside(store: RoundStore, strangers: list[Path]) -> None:
    """Move what is not of the run out of its store."""
    for path in strangers:
        _say(f"Not of this run: {path} is now {set_aside(store.run_dir, path)}")


def _mend(maker: RoundMaker, stored: Round) -> None:
    """Make what is missing of a round."""
    if not maker.ranks.broadcast(bool(stored.manifest.get("settings"))) and not _stamp_anew(maker, stored):
        maker.ranks.run_on_rank_zero(stored.delete)
        return
    before, now = stored.manifest["settings"]["responses"], Round.as_stored(maker.stamps.settings(stored))["responses"]
    if differences(before, now, *OF_POLICY):
        raise DamagedStoreError(f"{stored.path} can't be repaired: it was made with other settings than these.")
    there = [name for name in STAGES if name in stored.manifest["stages"] or stored.shards(name)]
    wanted = maker.ranks.broadcast(there)
    if "responses" in wanted:
        maker.fill(stored, partial(maker.past_policy, stored), "pairs", pairs="pairs" in wanted)


def _replace(maker: RoundMaker, stored: Round) -> None:
    """Make a round again of which nothing is left, or note that the run goes on without it."""
    _say(f"Repairing {stored.path}")
    needed = not stored.is_held_out and int(stored.path.name) >= rounds_done(maker.trainer)
    try:
        if _stamp_anew(maker, stored):
            pairs = not stored.is_held_out or maker.pairs_held_out
            maker.fill(stored, partial(maker.past_policy, stored), "pairs", pairs=pairs)
            return
        reason = "nothing tells which policy answered there."
    except DamagedStoreError as error:
        reason = str(error)
    if needed:
        raise DamagedStoreError(f"{stored.path} is missing, and the run needs it: {reason}")

    def go_without() -> None:
        stored.delete()
        maker.data.store.give_up(stored)

    maker.ranks.run_on_rank_zero(go_without)
    _say(f"{stored.path} is lost; the run has trained on it and goes on without it.")


def _stamp_anew(maker: RoundMaker, stored: Round) -> bool:
    """A new manifest where the copy is lost too: round and evaluation of the same number share a policy."""
    number, store = int(stored.path.name), maker.data.store
    sibling = store.round(number) if stored.is_held_out else store.held_out(number)
    made_by = sibling.manifest.get("settings", {}).get("responses")
    if made_by is None:
        return False
    maker.reconcile(stored, made_by)
    if not stored.is_held_out and number < rounds_done(maker.trainer):
        maker.ranks.run_on_rank_zero(lambda: stored.complete("training", seconds=0.0, loss=None, kl=None))
    return True


def _say(text: str) -> None:
    console.print(text, soft_wrap=True)
