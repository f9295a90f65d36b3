"""What a round leaves out is said in words, and truncated responses with the option to raise."""

from types import SimpleNamespace
from typing import Any

from rlhf_pl.rounds.report.left_out import describe_left_out
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


def test_what_a_round_leaves_out_reads_well_in_any_number() -> None:
    stages = {
        "pairs": {"dropped": {"no_reward_difference": 0, "same_answer": 1, "truncated_response": 4}},
        "rewards": {"failures": {"timeout": 0, "not_finite": 3}},
    }
    prompts = "1 with equal responses, 4 with a truncated response"
    assert describe_left_out(stages) == f"prompts: {prompts}; responses whose reward failed: 3 (not finite)"
    assert describe_left_out({"pairs": {"dropped": {"not_scored": 0}}}) == ""
