"""How far a round has moved the policy, and what to change where it hardly has."""

import math
from collections.abc import Mapping
from typing import Any

from rlhf_pl.algorithms.policy_loss import PolicyLoss
from rlhf_pl.algorithms.step_options import describe_larger_steps
from rlhf_pl.rounds.metrics import training_margins
from rlhf_pl.rounds.stages.kl import SPREAD, STAGE
from rlhf_pl.store.round_store import Round, RoundStore

# Nats per response. A policy at this KL can change the mean reward by sqrt(2 KL) = 0.14 of its standard deviation.
HARDLY = 0.01
_SMALL_MARGIN = 4 * math.sqrt(HARDLY)  # nats: 95 % quantile of |log-ratio margins| at that KL, p95^2 = 4 x 4 KL
_MOSTLY = 0.5  # share of the targets
HEALTHY = 0.1  # nats per response: rounds of less are small steps
_MORE_UPDATES = "more prompts a round (`data.prompts_per_round`), more `data.passes`, or a lower `data.batch_size`"
_MORE_WHERE_FIXED = "raise `data.updates_per_round`"
_LOW_RATE = 0.1  # share of the peak rate, below which the schedule alone has held a round back


def moved_by(store: RoundStore, index: int) -> float | None:
    """An estimate of the KL between the policies before and after round `index`, nats per response; None if not known.

    It is half the mean square of log pi - log pi_old ("k2"), which is never negative and close to a small KL, over the
    responses to the held-out prompts, or those that were trained on in the update where it is largest; the larger one.
    A round's first update is no evidence: the policy is still pi_old.
    """
    stages = store.round(index).manifest["stages"]
    found = [_held_out(store.held_out(index + 1)), _in_training(stages.get("training", {}))]
    known = [value for value in found if value is not None]
    return max(known) if known else None


def _held_out(stored: Round) -> float | None:
    info = stored.manifest["stages"].get(STAGE, {})
    if SPREAD in info:
        return info[SPREAD] ** 2 / 2
    if "new_old" not in info:
        return None
    return abs(info["new_old"]) + 2 * info.get("new_old_se", 0.0)  # of an earlier version


def _in_training(training: Mapping[str, Any]) -> float | None:
    movement = training.get("movement", {})
    if movement.get("updates", 0) < 2:
        return None
    if movement.get("k2") is not None:
        return movement["k2"]
    margin = training.get("margins", {}).get("reached_p95")  # to the reference: 0 where the policy has stayed there
    return None if margin is None else margin**2 / 16


def moved_in_all(store: RoundStore, rounds: int) -> float | None:
    """An upper estimate of the KL between the starting policy and that after `rounds` rounds; None if not known.

    The root mean squares of log-ratios add up at most.
    """
    found = [moved_by(store, index) for index in range(rounds) if store.round(index).is_complete("training")]
    if len(found) < rounds or any(value is None for value in found):
        return None
    return sum(math.sqrt(value) for value in found if value is not None) ** 2


def describe_standstill(store: RoundStore, index: int, loss: PolicyLoss) -> str:
    """That a round has moved the policy little or hardly, why, and which option to change; else, or if unknown, empty.

    Args:
        store: The run's rounds.
        index: The round.
        loss: The loss that it trained with.
    """
    manifest = store.round(index).manifest
    training, pairs = (manifest["stages"].get(name, {}) for name in ("training", "pairs"))
    moved, movement = moved_by(store, index), training.get("movement", {})
    if moved is None or moved >= HEALTHY or pairs.get("pairs") == 0 or training.get("loss") is None:
        return ""
    if pairs.get("equal_rewards", -1) == pairs.get("groups"):  # nothing to learn: the note about rewards says so
        return ""
    text = f"the policy hardly moved (KL below {HARDLY:g} nats per response)"
    if moved >= HARDLY:
        text = f"the policy moved little (KL about {moved:.1g} nats per response; healthy: {HEALTHY:g} to a few)"
    lr, peak = movement.get("lr"), _rate(manifest)
    if lr is not None and peak is not None and lr < _LOW_RATE * peak:
        return f"{text}: `model.lr_scheduler` has kept the rate at {lr:.2g} or less in this round, of {peak:.2g}"
    margins = training_margins(manifest)
    target, reached = margins.get("target_p95"), margins.get("reached", 0.0)
    is_fixed = "updates_per_round" in manifest.get("settings", {}).get("training", {})
    more = _MORE_WHERE_FIXED if is_fixed else _MORE_UPDATES
    return f"{text}: {_remedy(loss, target, reached, lr if peak is None else peak, movement.get('updates'), more)}"


def _remedy(
    loss: PolicyLoss, target: float | None, reached: float, lr: float | None, updates: int | None, more: str
) -> str:
    """What to change after a round that has moved the policy little or hardly.

    Args:
        loss: The loss.
        target: 95 % quantile of the round's absolute targets, nats; None for a loss without targets.
        reached: Slope of the log-ratio margins by the targets.
        lr: The peak learning rate.
        updates: Number of updates in the round.
        more: The options that give more of them.
    """
    options = describe_larger_steps(loss)
    if target is not None and target < _SMALL_MARGIN and options:
        return f"the targets are small, 95 % of them below {target:.2g} nats; {options}"
    if target is not None and reached >= _MOSTLY and options:
        return f"the targets are small, and {reached:.0%} of their size is reached; {options}"
    reaches = [term.reach for _, term in loss.terms]
    if target is None and options and all(reach is not None and reach < _SMALL_MARGIN for reach in reaches):
        furthest = max(reach for reach in reaches if reach is not None)
        return f"the loss hardly pushes a pair beyond a log-ratio margin of {furthest:.2g} nats; {options}"
    rate = "`--model.optimizer.lr`" + ("" if lr is None else f" (now {lr:.2g})")
    many = "" if updates is None else f" ({updates} in this round)"
    why = "" if target is None else "the targets are far from reached; "
    is_unknown = target is None and all(reach is None for reach in reaches)
    also = f"; or {options}" if is_unknown and options else ""
    return f"{why}raise {rate}, or make more updates{many}: {more}{also}"


def _rate(manifest: Mapping[str, Any]) -> float | None:
    optimizer = manifest.get("settings", {}).get("training", {}).get("optimizer", {})
    lr = optimizer.get("lr") if isinstance(optimizer, Mapping) else None
    return float(lr) if isinstance(lr, float | int) else None
