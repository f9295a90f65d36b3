"""SimPO and CPO: losses on the log-probs of pairs, without a reference."""

import math

from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_pl.algorithms.chosen_nll import ChosenNLL
from rlhf_pl.algorithms.loss_arguments import check_not_negative, check_positive, check_tensors
from rlhf_pl.algorithms.policy_loss import PolicyLoss
from rlhf_pl.algorithms.prompt_groups import PromptGroups
from rlhf_pl.algorithms.sum_of_losses import SumOfLosses


def simpo_loss(chosen_mean_logps: Tensor, rejected_mean_logps: Tensor, beta: float, gamma: float) -> Tensor:
    """SimPO: the mean log-probs of tokens, times beta, are to differ by a margin.

        loss = -log sigmoid(beta * (chosen - rejected) - gamma)

    By hand: mean log-probs -1 and -2 with beta 2 and gamma 1 give -log sigmoid(1) = 0.313262.

    Args:
        chosen_mean_logps: log pi_theta per token, the mean over the response, shape (B,), float32, nats.
        rejected_mean_logps: The same for the rejected response, shape (B,).
        beta: Implicit reward per nat a token, positive.
        gamma: Margin by which the implicit reward of the chosen response should be larger, 0 or more.

    Returns:
        Loss per pair, shape (B,), nats, not reduced.

    Raises:
        ValueError: The shapes differ.

    Source: arXiv:2405.14734, Eq. 6.
    """
    check_tensors(chosen_mean_logps, rejected_mean_logps)
    return -logsigmoid(beta * (chosen_mean_logps - rejected_mean_logps) - gamma)


def cpo_loss(chosen_logps: Tensor, rejected_logps: Tensor, beta: float) -> Tensor:
    """The preference term of CPO: DPO with a uniform reference.

        loss = -log sigmoid(beta * (chosen - rejected))

    By hand: log-probs -10 and -20 with beta 0.1 give -log sigmoid(1) = 0.313262.

    Args:
        chosen_logps: log pi_theta, summed over response tokens, shape (B,), float32, nats.
        rejected_logps: The same for the rejected response, shape (B,).
        beta: Implicit reward per nat, positive.

    Returns:
        Loss per pair, shape (B,), nats, not reduced.

    Raises:
        ValueError: The shapes differ.

    Source: arXiv:2401.08417, Eq. 3.
    """
    check_tensors(chosen_logps, rejected_logps)
    return -logsigmoid(beta * (chosen_logps - rejected_logps))


class SimPOLoss(PolicyLoss):
    """SimPO: the mean log-probs of the two responses, without a reference (arXiv:2405.14734).

    Args:
        beta: Implicit reward per nat a token, positive; the paper uses 2.0 to 2.5.
        gamma: Margin of implicit rewards, 0 or more; the paper uses 0.5 to 1.5. TRL's `simpo_gamma`.
    """

    needs = frozenset[str]()
    per = "pair"

    def __init__(self, beta: float = 2.0, gamma: float = 1.0) -> None:
        check_positive(beta=beta)
        check_not_negative(gamma=gamma)
        self.beta, self.gamma = beta, gamma

    def losses(self, groups: PromptGroups) -> Tensor:
        chosen, rejected = groups.pairs(groups.logps / groups.lengths)
        return simpo_loss(chosen, rejected, self.beta, self.gamma)

    @property
    def meaning(self) -> str:
        return (
            "logistic loss of beta x (mean log-prob of a chosen response's tokens - that of the rejected one's) - "
            f"gamma, nats; {math.log1p(math.exp(self.gamma)):.3f} where they are equally likely, but without a "
            "reference a run starts where its policy is; it falls as chosen responses gain on rejected ones"
        )


class CPOPreference(PolicyLoss):
    """The preference term of CPO alone (arXiv:2401.08417).

    Args:
        beta: Implicit reward per nat, positive.
    """

    needs = frozenset[str]()
    per = "pair"

    def __init__(self, beta: float = 0.1) -> None:
        check_positive(beta=beta)
        self.beta = beta

    def losses(self, groups: PromptGroups) -> Tensor:
        chosen, rejected = groups.pairs(groups.logps)
        return cpo_loss(chosen, rejected, self.beta)

    @property
    def meaning(self) -> str:
        return (
            "logistic loss of beta x (log-prob of the chosen - of the rejected response), nats; 0.693 (log 2) where "
            "they are equally likely, but without a reference a run starts where its policy is; it falls as chosen "
            "responses gain on rejected ones"
        )


class CPOLoss(SumOfLosses):
    """CPO: a preference term without a reference, plus the NLL of the chosen responses (arXiv:2401.08417).

    Args:
        beta: Implicit reward per nat, positive.
        nll_weight: Weight of the NLL, a mean over all tokens of chosen responses, 0 or more. TRL's `cpo_alpha`.
    """

    def __init__(self, beta: float = 0.1, nll_weight: float = 1.0) -> None:
        check_not_negative(nll_weight=nll_weight)
        preference = CPOPreference(beta)
        if nll_weight > 0:
            super().__init__([preference, ChosenNLL()], [1.0, nll_weight])
        else:
            super().__init__([preference])
        self.beta, self.nll_weight = beta, nll_weight
