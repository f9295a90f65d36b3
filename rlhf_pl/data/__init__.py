"""Prompts, pairs, and the DataModules that serve them."""

from rlhf_pl.data.offline import OfflineDataModule
from rlhf_pl.data.pairs import PairBatch
from rlhf_pl.data.preference_module import PreferenceDataModule
from rlhf_pl.data.prompts import Prompt, load_prompts
from rlhf_pl.data.rounds import RoundDataModule
from rlhf_pl.data.sft_module import SFTDataModule

__all__ = [
    "OfflineDataModule",
    "PairBatch",
    "PreferenceDataModule",
    "Prompt",
    "RoundDataModule",
    "SFTDataModule",
    "load_prompts",
]
