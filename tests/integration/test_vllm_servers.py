"""Rewards from real `vllm serve` processes: a classifier, and a judge."""

import importlib.util
from pathlib import Path

import pytest

from rlhf_pl.rewards import (
    ClassifierReward,
    Failure,
    JudgePairReward,
    JudgeScoreReward,
    RewardResult,
    Sample,
    VLLMServerReward,
)
from rlhf_pl.rollout import VLLMServerSampler
from rlhf_pl.utils.errors import InputError
from tests.conftest import save_reward_model
from tests.rewards.test_classifier import SAMPLES
from tests.vllm_serving import serving

pytestmark = [
    pytest.mark.slow(minutes=1),
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="no vLLM"),
]
MODEL = Path(__file__).parents[2] / "models" / "SmolLM2-135M-Instruct"


def test_a_served_reward_model_gives_the_scores_of_a_local_one(tmp_path: Path) -> None:
    """Even if its padding token ends conversations, and its config has a mean score (`bias`)."""
    reward_model = save_reward_model(tmp_path / "model", pad_token_id=2, bias=0.5)
    expected = [r.reward for r in ClassifierReward(str(reward_model)).score(SAMPLES)]
    before_eos = [r.reward for r in ClassifierReward(str(reward_model), score_at="before_eos").score(SAMPLES)]
    options = ("--runner", "pooling", "--dtype", "float32", "--hf-overrides", '{"bias": false}')
    with serving(reward_model, tmp_path / "log", *options) as url:
        served = {
            endpoint: VLLMServerReward(url, str(reward_model), endpoint=endpoint).score(SAMPLES)  # type: ignore[arg-type]
            for endpoint in ("classify", "pooling")
        }
        served_before_eos = VLLMServerReward(url, str(reward_model), score_at="before_eos").score(SAMPLES)
        (failure,) = VLLMServerReward(url, str(reward_model), model="other", retries=0).score(SAMPLES[:1])
        with pytest.raises(InputError, match="does not accept weights"):  # it was started only for scoring
            VLLMServerSampler([url], dtype="float32").check()
    for results in served.values():
        rewards = [r.reward for r in results if isinstance(r, RewardResult)]
        assert rewards == pytest.approx(expected, abs=1e-3)
    rewards = [r.reward for r in served_before_eos if isinstance(r, RewardResult)]
    assert rewards == pytest.approx(before_eos, abs=1e-3)
    assert before_eos != pytest.approx(expected, abs=1e-2)
    assert isinstance(failure, Failure)
    assert "404" in failure.detail


@pytest.mark.exhaustive
@pytest.mark.skipif(not MODEL.exists(), reason="`make model` has not been run")
def test_verdicts_of_a_small_judge_can_be_parsed(tmp_path: Path) -> None:
    """Only the format is checked: the model is too small for good verdicts."""
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    batch = [Sample("p", chat, text) for text in ("Paris is the capital of France.", "Bananas are yellow.", "Paris.")]
    with serving(MODEL, tmp_path / "log", "--dtype", "float32", "--served-model-name", "judge") as url:
        scores = JudgeScoreReward(f"{url}/v1", "judge", max_tokens=32).score(batch)
        win_rates = JudgePairReward(f"{url}/v1", "judge", max_tokens=32).score(batch)
    assert all(isinstance(s, RewardResult) and 0 <= s.reward <= 1 for s in scores), scores
    rates = [s.reward for s in win_rates if isinstance(s, RewardResult)]
    assert len(rates) == 3
    assert sum(rates) == pytest.approx(1.5), "every comparison gives one point in total"
