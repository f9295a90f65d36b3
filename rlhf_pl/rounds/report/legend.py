"""What the numbers of a round's line mean, for the loss in use."""

from rlhf_pl.algorithms.dpo_losses import DPOLoss, HingeLoss, IPOLoss, ReferenceLoss, RobustDPOLoss
from rlhf_pl.algorithms.kto_loss import KTOLoss
from rlhf_pl.algorithms.losses import RebelLoss
from rlhf_pl.algorithms.policy_gradient import PolicyGradientLoss
from rlhf_pl.algorithms.policy_loss import PolicyLoss
from rlhf_pl.algorithms.reinforce_losses import ReinforceLoss

_SURROGATE = "a surrogate: not a measure of progress, its gradient is what counts; look at reward and KL"
_REFERENCE = "of the log-ratios to the reference; it falls as chosen responses gain on rejected ones"
_MEANINGS: dict[type, str] = {
    RebelLoss: "mean of (log-ratio margin - eta x reward margin)^2, squared nats; a round starts at the mean of "
    "(eta x reward margin)^2, its squared targets, and falls towards 0 as they are reached",
    PolicyGradientLoss: _SURROGATE,
    ReinforceLoss: _SURROGATE,
    IPOLoss: "squared distance of the margin from 1 / (2 tau); it falls as the margin gets there",
    HingeLoss: f"hinge loss {_REFERENCE}; 1 where the policy is the reference",
    KTOLoss: "KTO's loss on log-ratios to the reference; it falls as responses above their prompt's mean reward gain",
    DPOLoss: f"logistic loss {_REFERENCE}; 0.693 (log 2) where the policy is the reference",
    RobustDPOLoss: f"logistic loss {_REFERENCE}; 0.693 (log 2) where the policy is the reference",
    ReferenceLoss: f"loss {_REFERENCE}",
}


def make_legend(loss: PolicyLoss, has_kl: bool, held_out: bool, max_kl: float | None = None) -> str:
    """Lines that explain loss and KL, as far as they are printed.

    Args:
        loss: The loss.
        has_kl: Whether KL(old||new) is measured in training.
        held_out: Whether KL(new||old) is measured on held-out prompts.
        max_kl: The KL above which the run warns, nats per response; None for none.
    """
    terms = [(type(term).__name__, next((text for kind, text in _MEANINGS.items() if isinstance(term, kind)), ""))
             for _, term in loss.terms]  # fmt: skip
    known = [(name, text) for name, text in terms if text]
    lines = []
    if len(terms) == 1 and known:
        lines.append(f"  loss: {known[0][1]}")
    elif known:
        parts = [f"{name} ({text})" if text else name for name, text in terms]
        lines.append("  loss: the weighted sum of " + " and ".join(parts))
    kls = ["KL(old||new): of the round's responses, a mean over its updates"] if has_kl else []
    kls += ["KL(new||old): of the new policy's responses to the held-out prompts"] if held_out else []
    if kls:
        high = "" if max_kl is None else f"; the run warns above {max_kl:g}"
        healthy = f"healthy: 0.1 to a few nats a round; near 0 the policy stands still{high}"
        lines += [f"  {kl}" for kl in kls]
        lines.append(f"  both by the mean log-ratio (k1), nats per response; {healthy}" if len(kls) > 1 else
                     f"  by the mean log-ratio (k1), nats per response; {healthy}")  # fmt: skip
    return "\n".join(["How to read the rounds:", *lines]) if lines else ""
