import math
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from rlhf_pl.rewards import FunctionReward, Reward, RewardResult, Sample, ScoringConfig
from rlhf_pl.rewards.guard import Failure, score_samples
from rlhf_pl.rewards.time_limit import call_with_time_limit
from rlhf_pl.utils.errors import InputError

DROP = ScoringConfig(retries=0, backoff_s=0, on_failure="drop")


def samples(count: int) -> list[Sample]:
    return [Sample(f"p{i}", [{"role": "user", "content": "?"}], f"response {i}") for i in range(count)]


class BatchedReward(Reward):
    """Calls a function on the whole batch, and records the batches."""

    def __init__(self, function: Callable[[Sequence[Sample]], list[Any]]) -> None:
        self.function, self.calls = function, []

    def score(self, batch: Sequence[Sample]) -> list[RewardResult]:
        self.calls.append([s.prompt_id for s in batch])
        return self.function(batch)


def test_a_failure_stops_the_run_by_default_and_names_the_prompt() -> None:
    def nan_at_37(response: str) -> float:
        return math.nan if response == "response 37" else 1.0

    with pytest.raises(InputError, match=r"prompt_id 'p37'.*returned nan.*`error`.*on_failure drop"):
        score_samples(FunctionReward(nan_at_37), samples(64), ScoringConfig(retries=0))


@pytest.mark.parametrize(("bad", "kind"), [(math.nan, "not_finite"), (math.inf, "not_finite"), ("x", "exception")])
def test_only_the_failed_response_is_dropped(bad: Any, kind: str) -> None:
    outcomes = score_samples(
        FunctionReward(lambda response: bad if response == "response 2" else 0.5), samples(4), DROP
    )
    assert [o.kind if isinstance(o, Failure) else o.reward for o in outcomes] == [0.5, 0.5, kind, 0.5]


def test_a_failing_batch_is_split_until_the_bad_response_is_alone() -> None:
    def fails_with_p5(batch: Sequence[Sample]) -> list[RewardResult]:
        if any(s.prompt_id == "p5" for s in batch):
            raise RuntimeError("no")
        return [RewardResult(1.0) for _ in batch]

    reward = BatchedReward(fails_with_p5)
    outcomes = score_samples(reward, samples(8), DROP)
    assert [isinstance(o, Failure) for o in outcomes] == [i == 5 for i in range(8)]
    assert len(reward.calls) <= 1 + 2 * 3


def test_scores_with_a_wrong_count_are_not_matched_to_responses() -> None:
    outcomes = score_samples(BatchedReward(lambda batch: [RewardResult(1.0)] * 3), samples(4), DROP)
    assert [o.kind for o in outcomes if isinstance(o, Failure)] == ["wrong_count"] * 4
    with pytest.raises(InputError, match=r"returned 3 scores for 4 responses \(prompt_id 'p0' to 'p3'\)"):
        score_samples(BatchedReward(lambda batch: [RewardResult(1.0)] * 3), samples(4), ScoringConfig(retries=0))


def test_failures_are_retried_after_a_pause() -> None:
    times: list[float] = []

    def succeeds_at_third_attempt(response: str) -> float:
        times.append(time.monotonic())
        if len(times) < 3:
            raise ConnectionError("busy")
        return 2.0

    outcomes = score_samples(
        FunctionReward(succeeds_at_third_attempt), samples(1), ScoringConfig(retries=2, backoff_s=0.05)
    )
    assert outcomes == [RewardResult(2.0)]
    assert times[1] - times[0] >= 0.05
    assert times[2] - times[1] >= 0.1


@pytest.mark.parametrize("none", [None, RewardResult(None)])  # type: ignore[arg-type]
def test_none_drops_its_response_at_the_first_call(none: Any) -> None:
    calls = []

    def only_even(responses: list[str]) -> list[Any]:
        calls.append(len(responses))
        return [1.0 if i % 2 == 0 else none for i in range(len(responses))]

    outcomes = score_samples(FunctionReward(only_even), samples(4), ScoringConfig(retries=9, on_failure="drop"))
    assert [o.kind if isinstance(o, Failure) else o.reward for o in outcomes] == [1.0, "refused", 1.0, "refused"]
    assert calls == [4]


@pytest.mark.parametrize("swallows", [False, True])
def test_a_reward_that_hangs_is_interrupted(swallows: bool) -> None:
    def hangs(response: str) -> float:
        if response == "response 1":
            try:
                time.sleep(60)
            except Exception:
                if not swallows:
                    raise
        return 1.0

    started = time.monotonic()
    outcomes = score_samples(FunctionReward(hangs), samples(3), ScoringConfig(0.2, retries=0, on_failure="drop"))
    assert time.monotonic() - started < 10
    assert [isinstance(o, Failure) and o.kind for o in outcomes] == [False, "timeout", False]


def test_a_service_that_always_hangs_is_not_called_for_every_response() -> None:
    reward = BatchedReward(lambda batch: time.sleep(60))  # type: ignore[arg-type]
    outcomes = score_samples(reward, samples(64), ScoringConfig(0.05, retries=0, on_failure="drop"))
    assert all(isinstance(o, Failure) and o.kind == "timeout" for o in outcomes)
    assert len(reward.calls) < 16


def test_the_time_limit_restores_another_alarm() -> None:
    has_fired = threading.Event()
    handler = signal.signal(signal.SIGALRM, lambda *_: has_fired.set())
    before = signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        assert call_with_time_limit(lambda: 1, 5, "r").value == 1
        assert has_fired.wait(5)
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *before)


def test_plain_numbers_of_a_reward_class_are_rewards() -> None:
    assert score_samples(BatchedReward(lambda batch: [1.5] * len(batch)), samples(2), DROP) == [RewardResult(1.5)] * 2
    bad = score_samples(BatchedReward(lambda batch: [RewardResult(1.0, {"part": math.nan})]), samples(1), DROP)
    assert "component `part`" in bad[0].detail  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "settings",
    [{"timeout_s": -1}, {"retries": -1}, {"on_failure": "ignore"}, {"on_failure": math.nan}, {"prompts_per_call": 0}],
)
def test_invalid_settings_are_errors(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"rollout.scoring.{next(iter(settings))}"):
        ScoringConfig(**settings)
