"""Prompts, pairs and conversations, and the DataModules that serve them."""

from rlhf_pl.data.group_batches import GroupBatch
from rlhf_pl.data.offline_datamodule import OfflineDataModule
from rlhf_pl.data.preference_datamodule import PreferenceDataModule
from rlhf_pl.data.prompts import Prompt, load_prompts
from rlhf_pl.data.round_datamodule import RoundDataModule
from rlhf_pl.data.round_source import RoundSource
from rlhf_pl.data.sft_datamodule import SFTDataModule

PairBatch = GroupBatch  # the name in earlier versions, where a group was a pair

__all__ = [
    "GroupBatch",
    "OfflineDataModule",
    "PairBatch",
    "PreferenceDataModule",
    "Prompt",
    "RoundDataModule",
    "RoundSource",
    "SFTDataModule",
    "load_prompts",
]
