"""The terms of a loss: their values, the weighted sum of their means, and their names in metrics."""

from collections import Counter
from collections.abc import Sequence

from torch import Tensor

from rlhf_pl.algorithms.policy_loss import PolicyLoss, element_losses
from rlhf_pl.algorithms.prompt_groups import PromptGroups


def term_losses(loss: PolicyLoss, groups: PromptGroups) -> list[Tensor]:
    """The values of each term of a loss: see `element_losses`."""
    return [element_losses(term, groups) for _, term in loss.terms]


def sum_of_means(loss: PolicyLoss, losses: Sequence[Tensor], factors: Sequence[float], groups: PromptGroups) -> Tensor:
    """The loss of a micro-batch.

    Args:
        loss: The loss.
        losses: The values of its terms.
        factors: Factor on the mean of each term, from the share of its elements that are in this micro-batch.
        groups: The input of the losses.
    """
    parts = [
        values.mean() * (weight * factor)
        for (weight, _), values, factor in zip(loss.terms, losses, factors, strict=True)
        if len(values)
    ]
    # without an element, the graph still reaches the weights: strategies need a backward pass on every rank
    return sum(parts[1:], parts[0]) if parts else groups.logps.sum() * 0


def loss_names(loss: PolicyLoss) -> list[str]:
    """Names of the terms in metrics: `loss`; or `loss/<class>` where there are several, numbered where one repeats."""
    kinds = [type(term).__name__ for _, term in loss.terms]
    if len(kinds) == 1:
        return ["loss"]
    seen: Counter[str] = Counter()
    names = []
    for kind in kinds:
        seen[kind] += 1
        names.append(f"loss/{kind}" if seen[kind] == 1 else f"loss/{kind}_{seen[kind]}")
    return names


def summarised(loss: PolicyLoss, metrics: dict[str, float], prefix: str) -> dict[str, float]:
    """Metrics as `prefix/name` after `PolicyLoss.summarise` of each term."""
    means = {name.removeprefix(f"{prefix}/"): value for name, value in metrics.items()}
    for _, term in loss.terms:
        means = term.summarise(means)
    return {f"{prefix}/{name}": value for name, value in means.items()}


def with_total_loss(loss: PolicyLoss, metrics: dict[str, float], prefix: str) -> dict[str, float]:
    """Add `prefix/loss`, the weighted sum of the terms' means, to `metrics`, as far as they are known."""
    weights = [weight for weight, _ in loss.terms]
    means = [metrics.get(f"{prefix}/{name}") for name in loss_names(loss)]
    known = [weight * mean for weight, mean in zip(weights, means, strict=True) if mean is not None]
    return {f"{prefix}/loss": sum(known)} | metrics if known and len(weights) > 1 else metrics
