"""Scoring while later responses are sampled."""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from rlhf_pl.data.prompts import Prompt, tokenize_prompts
from rlhf_pl.models.policy import load_lm
from rlhf_pl.models.source import ModelSource
from rlhf_pl.rewards import Failure, Reward, RewardResult, Sample, ScoringConfig
from rlhf_pl.rollout import EngineSpec, PromptTokens, Response, SamplingConfig, TransformersSampler
from rlhf_pl.rounds.stages import generate, score
from rlhf_pl.rounds.stages.score import ShardScorer
from rlhf_pl.rounds.stages.score_ahead import ScoreAhead
from rlhf_pl.store.round_store import Round
from rlhf_pl.utils.errors import InputError

SHARDS = [range(4), range(4, 8), range(8, 10)]
CONFIG = ScoringConfig(retries=0, prompts_per_call=2)


class ElsewhereReward(Reward):
    """Counts letters, records its calls, and fails on one prompt."""

    def __init__(self, fail_on: str = "") -> None:
        self.fail_on = fail_on
        self.seen: list[str] = []
        self.threads: set[str] = set()
        self.called = threading.Event()

    @property
    def is_remote(self) -> bool:
        return True

    def fingerprint(self) -> str:
        return "letters"  # the recorded calls do not change its scores

    def score(self, batch: Sequence[Sample]) -> list[RewardResult | Failure]:
        self.seen += [sample.prompt_id for sample in batch]
        self.threads.add(threading.current_thread().name)
        self.called.set()
        failure = Failure("unreachable", "No server.", final=True)
        return [failure if s.prompt_id == self.fail_on else RewardResult(len(s.response)) for s in batch]


class WaitingSampler(TransformersSampler):
    """Samples the second shard only after something was scored."""

    def __init__(self, reward: ElsewhereReward) -> None:
        super().__init__()
        self.reward, self.shards = reward, 0

    def generate(
        self, prompts: Sequence[PromptTokens], sampling: SamplingConfig
    ) -> Iterator[tuple[int, list[Response]]]:
        self.shards += 1
        if self.shards > 1:
            assert self.reward.called.wait(30)
        yield from super().generate(prompts, sampling)


@pytest.fixture
def prompts(source: ModelSource) -> list[Prompt]:
    made = [Prompt(f"p{i}", [{"role": "user", "content": f"Question {i}?"}]) for i in range(10)]
    return tokenize_prompts(made, source.tokenizer, 100)[0]


def sample(stored: Round, prompts: list[Prompt], source: ModelSource, reward: ElsewhereReward) -> None:
    sampler = WaitingSampler(reward)
    sampler.start(EngineSpec(source, 64, 64))
    sampler.load_weights(load_lm(source).state_dict().items())
    sampling = SamplingConfig(num_responses=2, max_response_tokens=8)
    with ScoreAhead(ShardScorer(stored, prompts, reward, CONFIG)) as ahead:
        generate(stored, prompts, sampler, sampling, source.tokenizer, 1, SHARDS, on_shard=ahead.add)


def test_responses_are_scored_once_while_others_are_sampled(
    tmp_path: Path, prompts: list[Prompt], source: ModelSource
) -> None:
    reward, stored = ElsewhereReward(), Round(tmp_path / "rounds" / "0000")
    sample(stored, prompts, source, reward)
    assert reward.threads == {"reward-call"}
    score(stored, prompts, reward, CONFIG)
    assert sorted(reward.seen) == sorted(p.prompt_id for p in prompts for _ in range(2))
    responses, rewards = stored.read("responses").to_pylist(), stored.read("rewards").to_pylist()
    assert [row["reward"] for row in rewards] == [len(row["response"]) for row in responses]
    assert [row["prompt_id"] for row in rewards] == [row["prompt_id"] for row in responses]
    assert not list(stored.path.rglob("*.journal"))


def test_a_failure_stops_sampling_and_keeps_earlier_scores(
    tmp_path: Path, prompts: list[Prompt], source: ModelSource
) -> None:
    reward, stored = ElsewhereReward(fail_on="p2"), Round(tmp_path / "rounds" / "0000")
    with pytest.raises(InputError, match=r"failed for prompt_id 'p2'.*No server"):
        sample(stored, prompts, source, reward)
    again = ElsewhereReward()
    sample(stored, prompts, source, again)
    score(stored, prompts, again, CONFIG)
    assert not {"p0", "p1"} & set(again.seen)  # of the first call, whose results the journal kept
    assert stored.is_complete("rewards")


def test_interrupted_sampling_does_not_wait_for_the_reward(
    tmp_path: Path, prompts: list[Prompt], source: ModelSource
) -> None:
    may_score = threading.Event()

    class SlowReward(ElsewhereReward):
        def score(self, batch: Sequence[Sample]) -> list[RewardResult | Failure]:
            self.called.set()
            assert may_score.wait(30)
            return super().score(batch)

    class DyingSampler(WaitingSampler):
        def reset(self) -> None:
            if self.shards == 2:
                raise KeyboardInterrupt

    reward, stored = SlowReward(), Round(tmp_path / "rounds" / "0000")
    sampler = DyingSampler(reward)
    sampler.start(EngineSpec(source, 64, 64))
    sampler.load_weights(load_lm(source).state_dict().items())
    sampling = SamplingConfig(num_responses=2, max_response_tokens=8)
    ahead = ScoreAhead(ShardScorer(stored, prompts, reward, CONFIG))
    with pytest.raises(KeyboardInterrupt), ahead:
        generate(stored, prompts, sampler, sampling, source.tokenizer, 1, SHARDS, on_shard=ahead.add)
    assert ahead._thread.is_alive()
    may_score.set()
    ahead._thread.join(30)
    assert len(reward.seen) == 4  # of the call in progress
