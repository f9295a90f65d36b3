"""A weighted sum of losses."""

import math
from collections.abc import Sequence

from torch import Tensor

from rlhf_pl.algorithms.policy_loss import PolicyLoss
from rlhf_pl.algorithms.prompt_groups import PromptGroups
from rlhf_pl.utils.errors import InputError


class SumOfLosses(PolicyLoss):
    """A weighted sum of losses, for example DPO plus the negative log-likelihood of the chosen responses.

    Each loss is a mean over its own elements of an update (pairs, groups, responses or tokens). Where one of them is on
    pairs, all of them see the responses of the selected pairs alone.

    Args:
        losses: The losses, each as `class_path` and `init_args`.
        weights: Weight of each loss; null for 1 each.
    """

    def __init__(self, losses: list[PolicyLoss], weights: list[float] | None = None) -> None:
        if not losses:
            raise InputError("`model.loss.losses` is empty. Name at least one loss.")
        if wrong := [loss for loss in losses if not isinstance(loss, PolicyLoss)]:
            raise InputError(f"`model.loss.losses` must be PolicyLosses, got {wrong[0]!r}.")
        weights = [1.0] * len(losses) if weights is None else [float(weight) for weight in weights]
        if len(weights) != len(losses):
            raise InputError(
                f"`model.loss.weights` has {len(weights)} numbers, but `model.loss.losses` has {len(losses)} losses. "
                "Give one weight for each."
            )
        if not all(0 < weight < math.inf for weight in weights):
            raise InputError(f"`model.loss.weights` must be positive and finite, got {weights}.")
        self.parts, self.weights = list(losses), weights
        self.needs = frozenset(name for _, term in self.terms for name in term.needs)  # type: ignore[misc]
        self.metric_names = tuple(dict.fromkeys(n for _, term in self.terms for n in term.metric_names))  # type: ignore[misc]

    @property
    def terms(self) -> Sequence[tuple[float, PolicyLoss]]:
        return [
            (weight * inner, term)
            for weight, loss in zip(self.weights, self.parts, strict=True)
            for inner, term in loss.terms
        ]

    @property
    def meaning(self) -> str:
        terms = [f"{weight:g} x {type(term).__name__} ({term.meaning})" for weight, term in self.terms]
        return " + ".join(terms)

    def losses(self, groups: PromptGroups) -> Tensor:
        raise InputError("`SumOfLosses` has no values of its own: use those of its `terms`.")

    def metrics(self, groups: PromptGroups) -> dict[str, Tensor]:
        return {name: value for _, term in self.terms for name, value in term.metrics(groups).items()}
