"""The numbers that the terms of a loss choose for each round, by their names in metrics."""

from rlhf_pl.algorithms.policy_loss import PolicyLoss


def chosen_names(loss: PolicyLoss) -> tuple[str, ...]:
    """Names of the numbers that a loss's terms choose, for metrics; numbered where several terms have one."""
    return tuple(_by_name(loss))


def chosen_numbers(loss: PolicyLoss) -> dict[str, float]:
    """What they chose for the round in training, by the same names, as far as it is known."""
    numbers = {name: term.choice.get(own) for name, (own, term) in _by_name(loss).items()}
    return {name: float(value) for name, value in numbers.items() if value is not None}


def _by_name(loss: PolicyLoss) -> dict[str, tuple[str, PolicyLoss]]:
    found: dict[str, tuple[str, PolicyLoss]] = {}
    for _, term in loss.terms:
        for own in term.chooses:
            count = sum(other == own for other, _ in found.values())
            found[own if count == 0 else f"{own}_{count + 1}"] = (own, term)
    return found
