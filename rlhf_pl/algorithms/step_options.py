"""Which options of a loss let a round move the policy further or less far, in words."""

from rlhf_pl.algorithms.policy_loss import PolicyLoss


def describe_larger_steps(loss: PolicyLoss) -> str:
    """How to change the options of a loss, or of the terms of a sum, so that rounds move further; empty for none."""
    found = []
    for _, term in loss.terms:
        found += [_describe(loss, term, name, how) for name, how in term.larger_steps.items()]
    return " or ".join(found)


def describe_smaller_steps(loss: PolicyLoss) -> str:
    """The same, so that rounds move less far; with the weight of a KL term, where the loss has one."""
    found = []
    for _, term in loss.terms:
        opposite = {name: "raise" if how.startswith("lower") else "lower" for name, how in term.larger_steps.items()}
        found += [_describe(loss, term, name, how) for name, how in opposite.items()]
        coef = getattr(getattr(term, "kl", None), "coef", None)
        if isinstance(coef, float | int):
            found.append(f"raise {_option(loss, term, 'kl', '.coef')} (now {coef:g})")
    return " or ".join(found)


def _describe(loss: PolicyLoss, term: PolicyLoss, name: str, how: str) -> str:
    now = getattr(term, name, None)
    return f"{how} {_option(loss, term, name)}" + (f" (now {now:g})" if isinstance(now, float | int) else "")


def _option(loss: PolicyLoss, term: PolicyLoss, name: str, field: str = "") -> str:
    return f"`model.loss.{name}{field}`" if hasattr(loss, name) else f"`{name}{field}` of `{type(term).__name__}`"
