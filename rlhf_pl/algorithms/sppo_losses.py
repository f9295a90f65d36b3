"""Self-play preference optimization: regress the log-ratio to pi_old onto how often a response wins."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhf_pl.algorithms.loss_arguments import check_positive, check_tensors
from rlhf_pl.algorithms.policy_loss import PairwiseLoss, PolicyLoss
from rlhf_pl.algorithms.prompt_groups import PromptGroups


def sppo_loss(logratios: Tensor, win_rates: Tensor, beta: float) -> Tensor:
    """SPPO: squared error between a response's log-ratio and its scaled win rate against pi_old.

        loss = (logratio - (P - 1/2) / beta)^2

    By hand: log-ratio 1 with P = 0.75 and beta 0.1 has the target 2.5: (1 - 2.5)^2 = 2.25.

    Args:
        logratios: log pi_theta - log pi_old, summed over response tokens, shape (B,), float32, nats.
        win_rates: P, the probability that the response is preferred to one of pi_old, shape (B,), in [0, 1].
        beta: Implicit reward per nat, positive: 1 / eta in the paper. Smaller moves further from pi_old.

    Returns:
        Loss per response, shape (B,), squared nats, not reduced.

    Raises:
        ValueError: The shapes differ.

    Source: arXiv:2405.00675, Eq. 4.7.
    """
    check_tensors(logratios, win_rates)
    return (logratios - (win_rates - 0.5) / beta) ** 2


def group_win_rates(rewards: Tensor, sizes: Tensor) -> Tensor:
    """Estimated probability that a response is preferred to another of its prompt (Bradley-Terry on rewards).

        P_i = mean over j != i of sigmoid(r_i - r_j)

    By hand: of rewards 0, 0 and log 3 the first has P = (0.5 + 0.25) / 2 = 0.375, the last (0.75 + 0.75) / 2 = 0.75.

    Args:
        rewards: Rewards of the responses, group by group, shape (R,), float32, nats.
        sizes: Responses of each group, at least two, shape (G,), int64.

    Returns:
        Win rate of each response, shape (R,).

    Source: arXiv:2405.00675, Algorithm 1, which also counts the tie of a response with itself.
    """
    padded = pad_sequence(rewards.split(sizes.tolist()), batch_first=True, padding_value=math.nan)
    wins = (padded[:, :, None] - padded[:, None, :]).sigmoid().nansum(2) - 0.5  # without the tie with itself
    return (wins / (sizes[:, None] - 1))[~padded.isnan()]


class SPPOHardLoss(PairwiseLoss):
    """SPPO on pairs, where the chosen response always wins and the rejected one never (arXiv:2405.00675).

    Args:
        beta: Implicit reward per nat, positive; the target log-ratios are 1 / (2 beta) and its negative.
    """

    needs = frozenset({"old_logps"})

    def __init__(self, beta: float = 0.001) -> None:
        check_positive(beta=beta)
        self.beta = beta

    def __call__(self, chosen_logratios: Tensor, rejected_logratios: Tensor, reward_margins: Tensor) -> Tensor:
        wins, defeats = torch.ones_like(chosen_logratios), torch.zeros_like(rejected_logratios)
        return sppo_loss(chosen_logratios, wins, self.beta) + sppo_loss(rejected_logratios, defeats, self.beta)

    @property
    def meaning(self) -> str:
        return (
            f"squared distances of a pair's two log-ratios from 1 / (2 beta) = {1 / (2 * self.beta):,.6g} and from "
            f"minus that, squared nats; a round starts at 1 / (2 beta^2) = {1 / (2 * self.beta**2):,.6g}, and falls "
            "towards 0 as they are reached; far targets need not be: look at reward and KL"
        )

    @property
    def larger_steps(self) -> Mapping[str, str]:
        return {"beta": "lower"}

    @property
    def reach(self) -> float:
        return 1 / self.beta


class SPPOLoss(PolicyLoss):
    """SPPO on all responses of a prompt, with win rates estimated from their rewards (arXiv:2405.00675).

    Args:
        beta: Implicit reward per nat, positive; the target log-ratios are between -1 / (2 beta) and 1 / (2 beta).
        reward_scale: Nats per reward unit, positive: two responses whose rewards differ by d prefer the better one with
            probability sigmoid(reward_scale * d).
    """

    needs = frozenset({"rewards", "old_logps"})
    per = "response"

    def __init__(self, beta: float = 0.001, reward_scale: float = 1.0) -> None:
        check_positive(beta=beta, reward_scale=reward_scale)
        self.beta, self.reward_scale = beta, reward_scale

    def losses(self, groups: PromptGroups) -> Tensor:
        win_rates = group_win_rates(self.reward_scale * groups.rewards, groups.sizes)
        return sppo_loss(groups.logps - groups.old_logps, win_rates, self.beta)

    @property
    def meaning(self) -> str:
        return (
            "mean of (log-ratio - (win rate - 1/2) / beta)^2, squared nats; a round starts at the mean of "
            f"((win rate - 1/2) / beta)^2, its squared targets, at most {1 / (4 * self.beta**2):,.6g}, and falls "
            "towards 0 as they are reached; far targets need not be: look at reward and KL"
        )

    @property
    def larger_steps(self) -> Mapping[str, str]:
        return {"beta": "lower", "reward_scale": "raise"}

    @property
    def reach(self) -> float:
        return 1 / self.beta  # between a response that always wins and one that never does
