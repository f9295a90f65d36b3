"""`--repair`: damaged files of the round store are made again, and just they."""

from functools import partial

from rlhf_pl.console import console
from rlhf_pl.data.progress import rounds_done
from rlhf_pl.provenance import OF_POLICY, differences
from rlhf_pl.round_maker import RoundMaker
from rlhf_pl.rounds import STAGES, DamagedStoreError, Round


def repair(maker: RoundMaker) -> None:
    """Make damaged files again, each from the policy that it came from.

    Raises:
        DamagedStoreError: The policy that answered is gone, and the round is still needed.
    """
    damaged = maker.data.store.damage()
    for stored, file in damaged:
        console.print(f"Repairing {file}", soft_wrap=True, markup=False)
        stored.drop(file)
    for stored in {str(s.path): s for s, _ in damaged}.values():
        if not stored.manifest.get("settings") and not _stamp_anew(maker, stored):
            stored.delete()
            continue
        before, now = stored.manifest["settings"]["responses"], Round.as_stored(maker.settings(stored))["responses"]
        if differences(before, now, *OF_POLICY):
            raise DamagedStoreError(f"{stored.path} can't be repaired: it was made with other settings than these.")
        wanted = [name for name in STAGES if name in stored.manifest["stages"] or stored.shards(name)]
        if "responses" in wanted:
            maker.fill(stored, partial(maker.past_policy, stored), "pairs", pairs="pairs" in wanted)


def _stamp_anew(maker: RoundMaker, stored: Round) -> bool:
    """A new manifest where the copy is lost too: round and evaluation of the same number share a policy."""
    number, store = int(stored.path.name), maker.data.store
    sibling = store.round(number) if stored.is_held_out else store.held_out(number)
    made_by = sibling.manifest.get("settings", {}).get("responses")
    if made_by is None:
        return False
    maker.reconcile(stored, made_by)
    if not stored.is_held_out and number < rounds_done(maker.trainer):
        stored.complete("training", seconds=0.0, loss=None, kl=None)
    return True
