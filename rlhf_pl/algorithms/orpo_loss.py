"""ORPO: supervised fine-tuning with a term on the odds of chosen and rejected responses."""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_pl.algorithms.chosen_nll import ChosenNLL
from rlhf_pl.algorithms.loss_arguments import check_positive, check_tensors
from rlhf_pl.algorithms.policy_loss import PolicyLoss
from rlhf_pl.algorithms.prompt_groups import PromptGroups
from rlhf_pl.algorithms.sum_of_losses import SumOfLosses

_LARGEST_LOGP = -torch.finfo(torch.float32).eps  # above it, 1 - p is 0 in float32


def odds_ratio_loss(chosen_mean_logps: Tensor, rejected_mean_logps: Tensor) -> Tensor:
    """The preference term of ORPO: the odds of the chosen response against those of the rejected one.

        log odds(p) = log p - log(1 - p) for log p, the mean log-prob of a token,
        loss = -log sigmoid(log odds(chosen) - log odds(rejected))

    By hand: p = 1/2 has odds 1 and p = 1/4 has odds 1/3; -log sigmoid(log 3) = -log(3/4) = 0.287682.

    Args:
        chosen_mean_logps: log pi_theta per token, the mean over the response, shape (B,), float32, nats. Those above
            -1.2e-7, whose 1 - p is 0 in float32, count as that.
        rejected_mean_logps: The same for the rejected response, shape (B,).

    Returns:
        Loss per pair, shape (B,), nats, not reduced.

    Raises:
        ValueError: The shapes differ.

    Source: arXiv:2403.07691, Eq. 4 and 7.
    """
    check_tensors(chosen_mean_logps, rejected_mean_logps)
    return -logsigmoid(_log_odds(chosen_mean_logps) - _log_odds(rejected_mean_logps))


def _log_odds(logps: Tensor) -> Tensor:
    """log p - log(1 - p), where each of two exact forms of log(1 - p) is used where it is accurate."""
    logps = logps.clamp(max=_LARGEST_LOGP)
    is_small = logps < -math.log(2)
    # the unused branch sees a harmless value: its gradient would be infinite times 0
    of_small = torch.log1p(-torch.where(is_small, logps, -1.0).exp())
    of_large = (-torch.where(is_small, -1.0, logps).expm1()).log()
    return logps - torch.where(is_small, of_small, of_large)


class OddsRatio(PolicyLoss):
    """The odds-ratio term of ORPO alone (arXiv:2403.07691)."""

    needs = frozenset[str]()
    per = "pair"

    def losses(self, groups: PromptGroups) -> Tensor:
        chosen, rejected = groups.pairs(groups.logps / groups.lengths)
        return odds_ratio_loss(chosen, rejected)

    @property
    def meaning(self) -> str:
        return (
            "logistic loss of the log odds of chosen against rejected responses, nats; 0.693 (log 2) where they are "
            "equally likely, but without a reference a run starts where its policy is; it falls as chosen responses "
            "gain on rejected ones"
        )


class ORPOLoss(SumOfLosses):
    """ORPO: supervised fine-tuning on the chosen responses, plus a term on the ratio of odds (arXiv:2403.07691).

    Args:
        odds_ratio_weight: Weight of the odds-ratio term, positive: lambda in the paper, `beta` in TRL. The NLL of the
            chosen responses, a mean over all their tokens, has the weight 1.
    """

    def __init__(self, odds_ratio_weight: float = 0.1) -> None:
        check_positive(odds_ratio_weight=odds_ratio_weight)
        super().__init__([ChosenNLL(), OddsRatio()], [1.0, odds_ratio_weight])
        self.odds_ratio_weight = odds_ratio_weight
