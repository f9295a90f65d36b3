"""LightningModules."""

from rlhf_pl.modules.pairwise import RebelModule
from rlhf_pl.modules.ppo import PPOModule
from rlhf_pl.modules.reward_model import RewardModelModule
from rlhf_pl.modules.sft import SFTModule

__all__ = ["PPOModule", "RebelModule", "RewardModelModule", "SFTModule"]
