"""What the numbers of a round's line mean, for the loss in use."""

from collections.abc import Collection

from rlhf_pl.algorithms.policy_loss import PolicyLoss
from rlhf_pl.rounds.report.movement import HEALTHY

_R2 = "R²: the share of their squares that reward margins explain"


def make_legend(
    loss: PolicyLoss, has_kl: bool, held_out: bool, max_kl: float | None = None, margins: Collection[str] = ()
) -> str:
    """Lines that explain the loss, the fit of the margins and KL, as far as they are printed.

    Args:
        loss: The loss.
        has_kl: Whether KL(old||new) is measured in training.
        held_out: Whether KL(new||old) is measured on held-out prompts.
        max_kl: The KL above which the run warns, nats per response; None for none.
        margins: Names of the metrics of pairs that are measured: see `margin_metric_names`.
    """
    lines = ["How to read the rounds:", f"  loss: {loss.meaning}"]
    if "target_p95" in margins:
        slope = "slope of the pairs' log-ratio margins on their targets, over all updates (0 at the first)"
        lines.append(f"  targets reached: {slope}; {_R2}")
    elif "slope" in margins:
        lines.append(f"  slope: of the pairs' log-ratio margins on their reward margins; {_R2}")
    kls = ["KL(old||new): of the round's responses, a mean over its updates"] if has_kl else []
    kls += ["KL(new||old): of the new policy's responses to the held-out prompts"] if held_out else []
    if kls:
        high = "" if max_kl is None else f"; the run warns above {max_kl:g}"
        both = "both " if len(kls) > 1 else ""
        lines += [f"  {kl}" for kl in kls]
        lines.append(
            f"  {both}by the mean log-ratio (k1), nats per response; healthy: {HEALTHY:g} to a few nats a round; near "
            f"0 the policy stands still{high}"
        )
    return "\n".join(lines)
