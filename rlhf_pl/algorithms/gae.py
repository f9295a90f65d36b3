"""Generalised advantage estimation (GAE) on packed responses."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_pl.algorithms.prompt_groups import OLD_VALUES, PromptGroups
from rlhf_pl.algorithms.reinforce_losses import whiten
from rlhf_pl.utils.errors import InputError


def gae(token_rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns of tokens.

        delta_t = r_t + gamma * V_{t+1} - V_t
        A_t = delta_t + gamma * lam * A_{t+1}
        R_t = A_t + V_t

    The state after the last token of a response, truncated or not, is terminal: its value and advantage are 0.

    By hand: rewards 0, 0 and 1, values 0.5, 0.2 and 0.4, gamma 1 and lam 0.5 have the deltas -0.3, 0.2 and 0.6, the
    advantages -0.3 + 0.5 * 0.5 = -0.05, 0.2 + 0.5 * 0.6 = 0.5 and 0.6, and the returns 0.45, 0.7 and 1.

    Args:
        token_rewards: r_t, the reward of each token, shape (M,), reward units.
        values: V_t, the value of the state before each token, shape (M,), reward units.
        lengths: Tokens of each response, at least one, on the same device, shape (R,), int64.
        gamma: Discount of the rewards of later tokens, from 0 to 1.
        lam: Weight of later deltas, from 0 to 1: at 0 the advantage is delta_t; at 1 it is the sum of the rewards from
            the token on, less its value.

    Returns:
        (advantages, returns), each of shape (M,), float32, computed in float64.

    Source: arXiv:1506.02438, Eq. 16.
    """
    values = values.double()
    ends = lengths.cumsum(0)  # one past the last token of each response
    following = torch.cat([values[1:], values.new_zeros(1)]).index_fill(0, ends - 1, 0.0)
    advantages = token_rewards.double() + gamma * following - values  # the deltas, which turn into advantages
    # from the end, one step for all responses that have a token there: long ones first, so that these are a prefix
    ordered, order = lengths.sort(descending=True)
    ends = ends[order]
    shorter = torch.searchsorted(ordered.flip(0), torch.arange(1, int(ordered[0])).to(ordered), right=True)
    for step, count in enumerate((len(ordered) - shorter).tolist(), start=2):
        tokens = ends[:count] - step
        advantages[tokens] += gamma * lam * advantages[tokens + 1]
    return advantages.float(), (advantages + values).float()


@dataclass(frozen=True)
class GAE:
    """Advantages and returns of a whole round.

    Args:
        gamma: Discount of the rewards of later tokens, above 0 and at most 1.
        lam: Weight of later temporal-difference errors, from 0 to 1.
        whiten_rewards: Divide the deviations of token rewards from their mean by their standard deviation, over the
            round; the mean stays.
    """

    gamma: float = 1.0
    lam: float = 0.95
    whiten_rewards: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= 1:
            raise InputError(f"`model.loss.gamma` must be above 0 and at most 1, got {self.gamma}.")
        if not 0 <= self.lam <= 1:
            raise InputError(f"`model.loss.lam` must be from 0 to 1, got {self.lam}.")

    def of_round(self, read: Callable[[], Iterator[PromptGroups]]) -> tuple[Tensor, Tensor]:
        """(advantages, returns) of all tokens of a round, each of shape (M,), float32; `read` as in `of_round`."""
        parts = [(groups.token_rewards(), groups.stored[OLD_VALUES], groups.lengths) for groups in read()]
        rewards, values, lengths = (torch.cat(part) for part in zip(*parts, strict=True))
        if self.whiten_rewards:
            rewards = whiten(rewards, shift_mean=False)
        return gae(rewards, values, lengths, self.gamma, self.lam)
