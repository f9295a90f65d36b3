"""Responses whose reward fails are counted by kind and excluded from a round's statistics."""

import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_pl.rewards import ScoringConfig
from rlhf_pl.store.round_store import RoundStore
from rlhf_pl.utils.errors import InputError
from tests.integration.test_fit import PROMPTS, fit

TRIAL = ("Yes, of course. Here is what I would do.", "", "word " * 40)  # the made-up responses of the trial
DROP = ScoringConfig(retries=0, backoff_s=0, on_failure="drop")


def sometimes_fails(response: str, prompt_id: str) -> float:
    """Not a number for one prompt, an error for another."""
    if response not in TRIAL and prompt_id == "p3":
        return float("nan")
    if response not in TRIAL and prompt_id == "p5":
        raise ValueError("no such score")
    return len(set(response)) / 10


def always_fails(response: str) -> float:
    return 1.0 if response in TRIAL else float("nan")


def test_statistics_exclude_failed_responses(tmp_path: Path, llama: Path, write_jsonl: Callable[..., str]) -> None:
    refresh = {"reward": sometimes_fails, "scoring": DROP}
    data = {"val_prompts": 0}
    fit(tmp_path, llama, write_jsonl(PROMPTS), refresh=refresh, data=data, max_epochs=1)
    stored = RoundStore(tmp_path).round(0)
    responses = stored.read("responses").to_pylist()
    by_prompt: dict[str, list[float]] = {}
    for row in responses:
        if row["prompt_id"] not in ("p3", "p5"):
            by_prompt.setdefault(row["prompt_id"], []).append(len(set(row["response"])) / 10)
    rewards = [value for values in by_prompt.values() for value in values]
    found = stored.info("rewards")
    assert found["failures"] == {"not_finite": 3, "exception": 3}
    assert found["scored"] == len(rewards) == 3 * 12
    assert [found[name] for name in ("mean", "std", "best", "worst")] == pytest.approx(
        [
            statistics.mean(rewards),
            statistics.pstdev(rewards),
            statistics.mean(map(max, by_prompt.values())),
            statistics.mean(map(min, by_prompt.values())),
        ]
    )
    assert stored.info("pairs")["dropped"]["not_scored"] == 2


def test_a_round_without_any_score_ends_the_run_and_is_scored_again(
    tmp_path: Path, llama: Path, write_jsonl: Callable[..., str]
) -> None:
    options = {"data": {"val_prompts": 0}, "max_epochs": 1}
    prompts = write_jsonl(PROMPTS)
    with pytest.raises(
        InputError, match=r"The reward failed for all 42 responses of .*rounds/0000\. The first failure: .*nan"
    ):
        fit(tmp_path, llama, prompts, refresh={"reward": always_fails, "scoring": DROP}, **options)
    stored = RoundStore(tmp_path).round(0)
    assert not stored.is_complete("rewards")
    before = sorted(file.name for file in (tmp_path / "rounds" / "0000" / "responses").iterdir())
    fit(tmp_path, llama, prompts, refresh={"reward": sometimes_fails, "scoring": DROP}, **options)
    assert RoundStore(tmp_path).round(0).info("rewards")["scored"] == 36
    assert sorted(file.name for file in (tmp_path / "rounds" / "0000" / "responses").iterdir()) == before
