"""LightningModules."""

from rlhf_pl.modules.rebel import RebelModule
from rlhf_pl.modules.reward_model import RewardModelModule

__all__ = ["RebelModule", "RewardModelModule"]
