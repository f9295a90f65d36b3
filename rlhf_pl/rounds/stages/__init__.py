"""Stages of a round before training: generate, score, select, log-probs. Each writes its part of the store."""

from rlhf_pl.rounds.stages.generate import generate, prompt_seed
from rlhf_pl.rounds.stages.logps import store_logps
from rlhf_pl.rounds.stages.score import prompt_means, score
from rlhf_pl.rounds.stages.select import count_usable, select

__all__ = ["count_usable", "generate", "prompt_means", "prompt_seed", "score", "select", "store_logps"]
