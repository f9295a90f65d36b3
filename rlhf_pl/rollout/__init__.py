"""Samplers: sample responses from the policy."""

from rlhf_pl.rollout.base import EngineSpec, PromptTokens, Response, Sampler, SamplingConfig
from rlhf_pl.rollout.transformers import TransformersSampler
from rlhf_pl.rollout.vllm import VLLMSampler
from rlhf_pl.rollout.vllm_server import VLLMServerSampler

__all__ = [
    "EngineSpec",
    "PromptTokens",
    "Response",
    "Sampler",
    "SamplingConfig",
    "TransformersSampler",
    "VLLMSampler",
    "VLLMServerSampler",
]
