"""Rewards: give every answer a number."""

from rlhf_pl.rewards.base import Reward, RewardResult, Sample
from rlhf_pl.rewards.function import FunctionReward

__all__ = ["FunctionReward", "Reward", "RewardResult", "Sample"]


def as_reward(reward: "Reward | str") -> Reward:
    """A reward given as an import path becomes a `FunctionReward`."""
    return FunctionReward(reward) if isinstance(reward, str) else reward
