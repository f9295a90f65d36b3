"""Anchored preference optimization: the chosen and the rejected response are each moved relative to the reference."""

from torch import Tensor

from rlhf_pl.algorithms.dpo_losses import ReferenceLoss
from rlhf_pl.algorithms.loss_arguments import check_tensors


def apo_zero_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float) -> Tensor:
    """APO-zero: raise the chosen response above the reference, and lower the rejected one below it.

        loss = 1 - sigmoid(beta * chosen) + sigmoid(beta * rejected)

    By hand: log-ratios 2 and -2 with beta 0.5 give (1 - 0.731059) + 0.268941 = 0.537883.

    Args:
        chosen_logratios: log pi_theta - log pi_ref, summed over response tokens, shape (B,), float32, nats.
        rejected_logratios: The same for the rejected response, shape (B,).
        beta: Implicit reward per nat, positive.

    Returns:
        Loss per pair, shape (B,), not reduced.

    Raises:
        ValueError: The shapes differ.

    Source: arXiv:2408.06266, Eq. 7, plus 1.
    """
    check_tensors(chosen_logratios, rejected_logratios)
    return 1 - (beta * chosen_logratios).sigmoid() + (beta * rejected_logratios).sigmoid()


def apo_down_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float) -> Tensor:
    """APO-down: lower the chosen response below the reference, and the rejected one further.

        loss = sigmoid(beta * chosen) + 1 - sigmoid(beta * (chosen - rejected))

    By hand: log-ratios 0 and -2 with beta 0.5 give 0.5 + (1 - 0.731059) = 0.768941.

    Args:
        chosen_logratios: log pi_theta - log pi_ref, summed over response tokens, shape (B,), float32, nats.
        rejected_logratios: The same for the rejected response, shape (B,).
        beta: Implicit reward per nat, positive.

    Returns:
        Loss per pair, shape (B,), not reduced.

    Raises:
        ValueError: The shapes differ.

    Source: arXiv:2408.06266, Eq. 8, plus 1.
    """
    check_tensors(chosen_logratios, rejected_logratios)
    return (beta * chosen_logratios).sigmoid() + 1 - (beta * (chosen_logratios - rejected_logratios)).sigmoid()


class APOZeroLoss(ReferenceLoss):
    """APO-zero, for chosen responses that are better than those of the reference (arXiv:2408.06266).

    Args:
        beta: Implicit reward per nat, positive; smaller moves further from the reference.
    """

    def __call__(self, chosen_logratios: Tensor, rejected_logratios: Tensor, reward_margins: Tensor) -> Tensor:
        return apo_zero_loss(chosen_logratios, rejected_logratios, self.beta)

    @property
    def meaning(self) -> str:
        return (
            "between 0 and 2; 1 where the policy is the reference; it falls as chosen responses become more likely "
            "than under the reference, and rejected ones less"
        )


class APODownLoss(ReferenceLoss):
    """APO-down, for chosen responses that are worse than those of the reference (arXiv:2408.06266).

    Args:
        beta: Implicit reward per nat, positive; smaller moves further from the reference.
    """

    def __call__(self, chosen_logratios: Tensor, rejected_logratios: Tensor, reward_margins: Tensor) -> Tensor:
        return apo_down_loss(chosen_logratios, rejected_logratios, self.beta)

    @property
    def meaning(self) -> str:
        return (
            "between 0 and 2; 1 where the policy is the reference; it falls as chosen responses become less likely "
            "than under the reference, and rejected ones still less"
        )
