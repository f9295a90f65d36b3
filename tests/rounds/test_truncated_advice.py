"""A round whose prompts are left out for truncated responses names the option to raise."""

from types import SimpleNamespace
from typing import Any

from rlhf_pl.rounds.report.sparse import describe_sparsity


def test_truncated_prompts_name_the_length_limit() -> None:
    stages = {
        "responses": {"sampling": {"num_responses": 4, "temperature": 1.0, "max_response_tokens": 16}},
        "pairs": {"prompts": 8, "dropped": {"truncated_response": 6}},
    }
    stored: Any = SimpleNamespace(manifest={"stages": stages})
    assert list(describe_sparsity(stored)) == ["truncated"]
    assert "raise `rollout.sampling.max_response_tokens` (now 16)" in describe_sparsity(stored)["truncated"]
    stages["pairs"]["dropped"] = {"truncated_response": 3}
    assert describe_sparsity(stored) == {}
