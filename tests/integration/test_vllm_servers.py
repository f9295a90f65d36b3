"""Rewards against real `vllm serve` processes: a classifier, and a judge."""

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


def test_served_reward_model_scores_as_here(tmp_path: Path) -> None:
    """Also one whose padding token ends its conversations, and whose config names a mean."""
    reward_model = save_reward_model(tmp_path / "model", pad_token_id=2, bias=0.5)
    expected = [r.reward for r in ClassifierReward(str(reward_model)).score(SAMPLES)]
    before_eos = [r.reward for r in ClassifierReward(str(reward_model), score_at="before_eos").score(SAMPLES)]
    options = ("--runner", "pooling", "--dtype", "float32", "--hf-overrides", '{"bias": false}')
    with serving(reward_model, tmp_path / "log", *options) as url:
        served = {
            endpoint: VLLMServerReward(url, str(reward_model), endpoint=endpoint).score(SAMPLES)  # type: ignore[arg-type]
            for endpoint in ("classify", "pooling")
        }
        sent_less = VLLMServerReward(url, str(reward_model), score_at="before_eos").score(SAMPLES)
        (lost,) = VLLMServerReward(url, str(reward_model), model="other", retries=0).score(SAMPLES[:1])
        with pytest.raises(InputError, match="does not take weights"):  # it was started for scoring alone
            VLLMServerSampler([url], dtype="float32").check()
    for results in served.values():
        found = [r.reward for r in results if isinstance(r, RewardResult)]
        assert found == pytest.approx(expected, abs=1e-3)
    found = [r.reward for r in sent_less if isinstance(r, RewardResult)]
    assert found == pytest.approx(before_eos, abs=1e-3)
    assert before_eos != pytest.approx(expected, abs=1e-2)
    assert isinstance(lost, Failure)
    assert "404" in lost.detail


@pytest.mark.skipif(not MODEL.exists(), reason="`make model` has not been run")
def test_judges_on_a_small_model_give_verdicts_in_the_agreed_form(tmp_path: Path) -> None:
    """What so small a model thinks of the answers is not asserted; that every verdict can be read is."""
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    batch = [Sample("p", chat, text) for text in ("Paris is the capital of France.", "Bananas are yellow.", "Paris.")]
    with serving(MODEL, tmp_path / "log", "--dtype", "float32", "--served-model-name", "judge") as url:
        scores = JudgeScoreReward(f"{url}/v1", "judge", max_tokens=32).score(batch)
        shares = JudgePairReward(f"{url}/v1", "judge", max_tokens=32).score(batch)
    assert all(isinstance(s, RewardResult) and 0 <= s.reward <= 1 for s in scores), scores
    won = [s.reward for s in shares if isinstance(s, RewardResult)]
    assert len(won) == 3
    assert sum(won) == pytest.approx(1.5), "every comparison has one point to give"
