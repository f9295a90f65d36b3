"""What the numbers of a round's line mean, for the loss in use."""

from rlhf_pl.algorithms.policy_loss import PolicyLoss
from rlhf_pl.rounds.report.movement import HEALTHY


def make_legend(loss: PolicyLoss, has_kl: bool, held_out: bool, max_kl: float | None = None) -> str:
    """Lines that explain loss and KL, as far as they are printed.

    Args:
        loss: The loss.
        has_kl: Whether KL(old||new) is measured in training.
        held_out: Whether KL(new||old) is measured on held-out prompts.
        max_kl: The KL above which the run warns, nats per response; None for none.
    """
    lines = ["How to read the rounds:", f"  loss: {loss.meaning}"]
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
