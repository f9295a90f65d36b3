"""Advantages of responses, from the rewards of their prompt's responses."""

from typing import Literal, get_args

import torch
from torch import Tensor

from rlhf_pl.algorithms.prompt_groups import PromptGroups, segment_sums, spread
from rlhf_pl.utils.errors import InputError

GroupAdvantage = Literal["leave_one_out", "group_mean", "group_normalized"]
NORMALIZING_EPS = 1e-4  # added to a group's standard deviation, as in TRL


def leave_one_out_advantages(rewards: Tensor, sizes: Tensor) -> Tensor:
    """RLOO: a response's reward minus the mean reward of the other responses to its prompt.

        A_i = r_i - mean of r_j over j != i = n / (n - 1) * (r_i - mean of all n)

    By hand: rewards 1, 2 and 6 give 1 - 4 = -3, 2 - 3.5 = -1.5 and 6 - 1.5 = 4.5.

    Args:
        rewards: Rewards of the responses, group by group, shape (R,), float32, reward units.
        sizes: Responses of each group, at least two, shape (G,), int64.

    Returns:
        Shape (R,), reward units.

    Source: arXiv:2402.14740, Eq. 8.
    """
    deviations = group_mean_advantages(rewards, sizes)
    return deviations * spread(sizes / (sizes - 1), sizes, len(rewards))


def group_mean_advantages(rewards: Tensor, sizes: Tensor) -> Tensor:
    """Dr. GRPO: a response's reward minus the mean reward of all responses to its prompt.

    By hand: rewards 1, 2 and 6 give -2, -1 and 3.

    Args:
        rewards: Rewards of the responses, group by group, shape (R,), float32, reward units.
        sizes: Responses of each group, shape (G,), int64.

    Returns:
        Shape (R,), reward units.

    Source: arXiv:2503.20783, Sec. 3.2.
    """
    return rewards - spread(segment_sums(rewards, sizes) / sizes, sizes, len(rewards))


def group_normalized_advantages(rewards: Tensor, sizes: Tensor) -> Tensor:
    """GRPO: the same, divided by the standard deviation of the group's rewards (of a sample) plus 1e-4.

    By hand: rewards 1, 2 and 6 have the standard deviation sqrt((4 + 1 + 9) / 2) = 2.64575, which gives -2 / 2.64585 =
    -0.755901, -0.377950 and 1.133851. Equal rewards give exactly 0.

    Args:
        rewards: Rewards of the responses, group by group, shape (R,), float32, reward units.
        sizes: Responses of each group, at least two, shape (G,), int64.

    Returns:
        Shape (R,), without unit.

    Source: arXiv:2402.03300, Sec. 4.1.2.
    """
    deviations = group_mean_advantages(rewards, sizes)
    std = (segment_sums(deviations.square(), sizes) / (sizes - 1)).sqrt()
    return deviations / spread(std + NORMALIZING_EPS, sizes, len(rewards))


def group_advantages(kind: GroupAdvantage, groups: PromptGroups) -> Tensor:
    """Advantages of one kind, of the rewards with their KL penalty, shape (R,); exactly 0 for equal rewards.

    The same in all batches that a group may be in: rewards do not change while a round trains.
    """
    compute = {
        "leave_one_out": leave_one_out_advantages,
        "group_mean": group_mean_advantages,
        "group_normalized": group_normalized_advantages,
    }[kind]
    advantages = compute(groups.rewards.double(), groups.sizes).float()
    return advantages.masked_fill(groups.per_response(has_equal_rewards(groups)), 0.0)


def has_equal_rewards(groups: PromptGroups) -> Tensor:
    """Whether all rewards of a group are equal, so that its advantages are 0, shape (G,), bool."""
    rewards, sizes = groups.rewards, groups.sizes
    largest, smallest = (torch.segment_reduce(rewards, which, lengths=sizes, unsafe=True) for which in ("max", "min"))
    return largest == smallest


def check_group_advantage(kind: str) -> None:
    """Raise InputError for an unknown kind of advantage."""
    if kind not in get_args(GroupAdvantage):
        raise InputError(f"`model.loss.advantage` must be one of {', '.join(get_args(GroupAdvantage))}, got {kind!r}.")
