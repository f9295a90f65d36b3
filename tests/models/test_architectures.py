"""Policies of many architectures: log-probs in train mode equal those of plain transformers on single rows."""

from typing import Any

import pytest

from scripts.causal_lms import try_architecture

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 48,
    "long_factor": [4.0] * 48,
    "original_max_position_embeddings": 4096,
    "factor": 32.0,
}


@pytest.mark.parametrize(
    ("model_type", "changes", "expected"),
    [
        ("llama", {}, "shared prompts"),
        ("qwen3", {}, "shared prompts"),
        ("mistral", {}, "shared prompts"),  # sliding window
        ("gemma2", {}, "shared prompts"),  # soft-capping
        ("gemma3_text", {}, "shared prompts"),  # two kinds of layers
        ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 4096}, "shared prompts"),
        ("mixtral", {}, "shared prompts"),  # router noise
        ("gpt_oss", {}, "shared prompts"),  # sinks, no sdpa
        ("gpt2", {}, "shared prompts"),  # learned positions
        ("opt", {}, "shared prompts"),  # layer dropout
        ("mamba", {}, "works"),  # no attention
        ("gemma4_text", {}, "shared prompts"),  # heads of several sizes
        ("bert", {}, "refused"),  # layers between backbone and head
    ],
)
def test_log_probs_equal_plain_transformers(model_type: str, changes: dict[str, Any], expected: str) -> None:
    outcome = try_architecture(model_type, **changes)
    assert outcome.kind == expected, outcome
