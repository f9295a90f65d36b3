"""Rewards: a score for every response."""

from rlhf_pl.rewards.armorm import ArmoRMReward
from rlhf_pl.rewards.base import Failure, Reward, RewardResult, Sample
from rlhf_pl.rewards.classifier import ClassifierReward
from rlhf_pl.rewards.combine import CombinedReward, WeightedReward, as_reward
from rlhf_pl.rewards.function import FunctionReward
from rlhf_pl.rewards.guard import ScoringConfig
from rlhf_pl.rewards.http import HTTPReward
from rlhf_pl.rewards.judge import JudgePairReward, JudgeScoreReward
from rlhf_pl.rewards.stored import StoredReward
from rlhf_pl.rewards.verify import ExactAnswer, JSONSchema, LengthWindow, NumericAnswer, RegexMatch, RuleReward
from rlhf_pl.rewards.vllm_server import VLLMServerReward

__all__ = [
    "ArmoRMReward",
    "ClassifierReward",
    "CombinedReward",
    "ExactAnswer",
    "Failure",
    "FunctionReward",
    "HTTPReward",
    "JSONSchema",
    "JudgePairReward",
    "JudgeScoreReward",
    "LengthWindow",
    "NumericAnswer",
    "RegexMatch",
    "Reward",
    "RewardResult",
    "RuleReward",
    "Sample",
    "ScoringConfig",
    "StoredReward",
    "VLLMServerReward",
    "WeightedReward",
    "as_reward",
]
