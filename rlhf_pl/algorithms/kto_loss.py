"""KTO: single responses are desirable or undesirable, relative to the reference and to its divergence."""

from collections.abc import Mapping

import torch
from torch import Tensor

from rlhf_pl.algorithms.dpo_losses import SATURATES_AT
from rlhf_pl.algorithms.loss_arguments import check_not_negative, check_positive, check_tensors
from rlhf_pl.algorithms.policy_loss import PolicyLoss
from rlhf_pl.algorithms.prompt_groups import Z_REF, PromptGroups
from rlhf_pl.utils.errors import InputError

_ROUNDING = 1e-6  # rewards this close to their mean, relative to the largest, are equal to it in float32


def kto_loss(
    logratios: Tensor,
    desirable: Tensor,
    z_ref: Tensor | float,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO: the value of a gain for desirable responses, and of a loss for undesirable ones.

        desirable: w_d * (1 - sigmoid(beta * (logratio - z_ref))),
        undesirable: w_u * (1 - sigmoid(beta * (z_ref - logratio)))

    By hand: log-ratio 3, z_ref 1 and beta 0.5 give 1 - sigmoid(1) = 0.268941 for a desirable response, and
    1 - sigmoid(-1) = 0.731059 for an undesirable one.

    Args:
        logratios: log pi_theta - log pi_ref, summed over response tokens, shape (B,), float32, nats.
        desirable: Whether each response is desirable, shape (B,), bool.
        z_ref: Estimate of KL(pi_theta || pi_ref), 0 or more, nats, without gradient: a number or shape ().
        beta: Implicit reward per nat, positive.
        desirable_weight: w_d, 0 or more.
        undesirable_weight: w_u, 0 or more.

    Returns:
        Loss per response, shape (B,), not reduced.

    Raises:
        ValueError: The shapes differ.

    Source: arXiv:2402.01306, Eq. 7 and 8, with the constant lambda_y as the weight of y in both.
    """
    check_tensors(logratios, desirable)
    gains = beta * (logratios - z_ref)
    weights = torch.where(desirable, desirable_weight, undesirable_weight)
    return weights * (1 - torch.where(desirable, gains, -gains).sigmoid())


class KTOLoss(PolicyLoss):
    """KTO, on all responses of a prompt (arXiv:2402.01306).

    A response is desirable if its reward is above the mean of its prompt's rewards, undesirable if it is below, and
    left out if it is equal.

    Args:
        beta: Implicit reward per nat, positive; smaller moves further from the reference.
        desirable_weight: Weight of desirable responses, 0 or more.
        undesirable_weight: Weight of undesirable responses, 0 or more.
    """

    needs = frozenset({"rewards", "reference_logps", Z_REF})
    per = "response"
    rewards_as_labels = True

    def __init__(self, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> None:
        check_positive(beta=beta)
        check_not_negative(desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
        if desirable_weight == undesirable_weight == 0:
            raise InputError("`model.loss.desirable_weight` and `undesirable_weight` are both 0: nothing is learned.")
        self.beta, self.desirable_weight, self.undesirable_weight = beta, desirable_weight, undesirable_weight

    def counts_in(self, groups: PromptGroups) -> Tensor:
        return _labels(groups).abs()

    def losses(self, groups: PromptGroups) -> Tensor:
        labels = _labels(groups)
        used = labels != 0
        return kto_loss(
            (groups.logps - groups.reference_logps)[used],
            labels[used] > 0,
            groups.stored[Z_REF],
            self.beta,
            self.desirable_weight,
            self.undesirable_weight,
        )

    @property
    def meaning(self) -> str:
        weights = {self.desirable_weight, self.undesirable_weight}
        start = f"{max(weights) / 2:g}" if len(weights) == 1 else "half the mean of the weights"
        return (
            f"mean of weight x (1 - a response's value, from 0 to 1); {start} where the policy is the reference; it "
            "falls as responses above their prompt's mean reward gain on the reference, and those below it lose"
        )

    @property
    def larger_steps(self) -> Mapping[str, str]:
        return {"beta": "lower"}

    @property
    def reach(self) -> float:
        return SATURATES_AT / self.beta


def _labels(groups: PromptGroups) -> Tensor:
    """1 for desirable responses, -1 for undesirable ones, 0 for those that are left out: shape (R,), int64."""
    rewards = groups.rewards
    above = rewards - groups.group_means(rewards)
    largest = torch.segment_reduce(rewards.abs(), "max", lengths=groups.sizes, unsafe=True)
    equal = above.abs() <= _ROUNDING * torch.repeat_interleave(largest, groups.sizes)
    return above.sign().long().masked_fill(equal, 0)
