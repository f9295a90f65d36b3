"""Rewards: give every answer a number."""

from collections.abc import Callable
from typing import Any

from rlhf_pl.rewards.base import Reward, RewardResult, Sample
from rlhf_pl.rewards.function import FunctionReward
from rlhf_pl.rewards.guard import ScoringConfig

__all__ = ["FunctionReward", "Reward", "RewardResult", "Sample", "ScoringConfig"]


def as_reward(reward: Reward | str | Callable[..., Any]) -> Reward:
    """A function, or the import path of one, becomes a `FunctionReward`."""
    return reward if isinstance(reward, Reward) else FunctionReward(reward)
