"""Prompts, pairs, and the DataModules that serve them."""

from rlhf_pl.data.pairs import PairBatch
from rlhf_pl.data.prompts import Prompt, load_prompts
from rlhf_pl.data.rounds import RoundDataModule

__all__ = ["PairBatch", "Prompt", "RoundDataModule", "load_prompts"]
