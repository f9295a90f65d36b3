"""LightningModules."""

from rlhf_pl.modules.pairwise import RebelModule
from rlhf_pl.modules.reward_model import RewardModelModule
from rlhf_pl.modules.sft import SFTModule

__all__ = ["RebelModule", "RewardModelModule", "SFTModule"]
