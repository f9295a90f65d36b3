import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from rlhf_pl.algorithms.pair_selection import BestWorst
from rlhf_pl.data.prompts import Prompt, tokenize_prompts
from rlhf_pl.distributed.ranks import Ranks
from rlhf_pl.models.packed_batch import PackedBatch, PrefixGroup, batches_by_length, pack
from rlhf_pl.models.policy import PolicyLM, load_lm
from rlhf_pl.models.source import ModelSource
from rlhf_pl.rewards import FunctionReward
from rlhf_pl.rollout import EngineSpec, PromptTokens, Response, SamplingConfig, TransformersSampler
from rlhf_pl.rounds.metrics import held_out_metrics
from rlhf_pl.rounds.stages import generate, prompt_seed, score, select, store_logps
from rlhf_pl.rounds.stages.logps import steps_by_length
from rlhf_pl.store.round_store import Round, RoundStore
from rlhf_pl.utils.errors import InputError
from tests.stored_pairs import read_pairs

SAMPLING = SamplingConfig(num_responses=3, max_response_tokens=8, temperature=0.8)


class CountingSampler(TransformersSampler):
    """Counts prompts; can be interrupted after a number of them."""

    def __init__(self, interrupt_after: int | None = None) -> None:
        super().__init__()
        self.interrupt_after = interrupt_after
        self.sampled = 0

    def generate(
        self, prompts: Sequence[PromptTokens], sampling: SamplingConfig
    ) -> Iterator[tuple[int, list[Response]]]:
        for item in super().generate(prompts, sampling):
            if self.sampled == self.interrupt_after:
                raise KeyboardInterrupt
            self.sampled += 1
            yield item


@pytest.fixture(scope="module")
def lm(source: ModelSource) -> Any:
    return load_lm(source)


@pytest.fixture
def prompts(source: ModelSource) -> list[Prompt]:
    made = [Prompt(f"p{i}", [{"role": "user", "content": f"Question {i}?"}], {"key": i}) for i in range(10)]
    return tokenize_prompts(made, source.tokenizer, 100)[0]


def run_generate(
    stored: Round, prompts: list[Prompt], source: ModelSource, lm: Any, sampler: CountingSampler, **options: bool
) -> None:
    sampler.start(EngineSpec(source, 64, 64))
    sampler.load_weights(lm.state_dict().items())
    shards = [range(4), range(4, 8), range(8, 10)]
    generate(stored, prompts, sampler, SAMPLING, source.tokenizer, run_seed=1, shards=shards, **options)


def test_a_round_from_responses_to_logps(tmp_path: Path, prompts: list[Prompt], source: ModelSource, lm: Any) -> None:
    stored = Round(tmp_path / "rounds" / "0000")
    run_generate(stored, prompts, source, lm, CountingSampler())
    responses = stored.read("responses")
    assert responses.num_rows == 30
    assert list(stored.shards("responses")) == [0, 1, 2]
    info = stored.info("responses")
    assert info["tokens"] == sum(len(t) for t in responses["response_tokens"].to_pylist())
    assert info["sampling"]["temperature"] == 0.8
    first = responses.slice(0, 1).to_pylist()[0]
    assert json.loads(first["prompt"]) == prompts[0].messages
    assert first["prompt_tokens"] == list(prompts[0].token_ids)
    assert first["response"] == source.tokenizer.decode(first["response_tokens"], skip_special_tokens=True)

    score(stored, prompts, FunctionReward(lambda response, key: float(len(response) % 5 + 10 * (key == 3))))
    rewards = stored.read("rewards")["reward"].to_pylist()
    for row, reward in zip(responses.to_pylist(), rewards, strict=True):
        assert reward == len(row["response"]) % 5 + 10 * (row["prompt_id"] == "p3")
    assert stored.info("rewards")["mean"] == pytest.approx(sum(rewards) / 30)

    select(stored, BestWorst(), run_seed=1)
    pairs = read_pairs(stored)
    by_key = {(r["prompt_id"], r["response_index"]): r for r in responses.to_pylist()}
    for pair in pairs:
        group = [rewards[i] for i, r in enumerate(responses["prompt_id"].to_pylist()) if r == pair["prompt_id"]]
        assert (pair["chosen_reward"], pair["rejected_reward"]) == (max(group), min(group))
        assert pair["chosen_tokens"] == by_key[pair["prompt_id"], pair["chosen_index"]]["response_tokens"]
    dropped = stored.info("pairs")["dropped"]
    assert len(pairs) + sum(dropped.values()) == 10

    def policy(rows: PackedBatch, temperature: float) -> torch.Tensor:
        with torch.no_grad():
            return PolicyLM(lm)(**rows.inputs(), temperature=temperature)

    store_logps(stored, {"old": policy, "reference": policy}, steps_by_length(60, Ranks()), temperature=0.8)
    for pair in read_pairs(stored):
        for which in ("chosen", "rejected"):
            alone = pack([PrefixGroup(pair["prompt_tokens"], (pair[f"{which}_tokens"],))])
            expected = policy(alone, 0.8).sum().item()
            assert pair[f"{which}_old_logp"] == pytest.approx(expected, abs=1e-4)
            assert pair[f"{which}_reference_logp"] == pair[f"{which}_old_logp"]
    assert stored.is_complete("logps")


@pytest.mark.parametrize("stream", [False, True])
def test_stored_shards_are_not_sampled_again(
    tmp_path: Path, prompts: list[Prompt], source: ModelSource, lm: Any, stream: bool
) -> None:
    """Shard by shard and as a stream: equal tokens, sampled with equal seeds."""
    whole, broken = Round(tmp_path / "rounds" / "0000"), Round(tmp_path / "again" / "rounds" / "0000")
    run_generate(whole, prompts, source, lm, CountingSampler(), per_token=True)
    with pytest.raises(KeyboardInterrupt):
        run_generate(broken, prompts, source, lm, CountingSampler(interrupt_after=6), per_token=True, stream=stream)
    done = 4 * len(broken.shards("responses"))
    assert 0 < done < 10
    assert not broken.is_complete("responses")
    second = CountingSampler()
    run_generate(broken, prompts, source, lm, second, per_token=True, stream=stream)
    assert second.sampled == 10 - min(done, 10)
    names = ["sampler_logp", "sampler_token_logps"]
    again, expected = (r.read("responses").drop_columns(names) for r in (broken, whole))
    assert again.equals(expected)
    logps = [r.read("responses")["sampler_logp"].to_pylist() for r in (broken, whole)]
    assert logps[0] == pytest.approx(logps[1], abs=1e-4)  # rounding depends on what else is in the batch
    own, others = (r.read("responses")["sampler_token_logps"].to_pylist() for r in (broken, whole))
    for values, wanted, tokens in zip(own, others, expected["response_tokens"].to_pylist(), strict=True):
        assert values == pytest.approx(wanted, abs=1e-4)
        assert len(values) == len(tokens)


class Silent(CountingSampler):
    """Reports no log-probs, or others than numbers."""

    def __init__(self, *logps: float) -> None:
        super().__init__()
        self.logps = list(logps)

    def generate(
        self, prompts: Sequence[PromptTokens], sampling: SamplingConfig
    ) -> Iterator[tuple[int, list[Response]]]:
        for index, responses in super().generate(prompts, sampling):
            yield index, [replace(r, logps=self.logps * len(r.token_ids)) for r in responses]


@pytest.mark.parametrize(("logps", "message"), [((), "returned 0 log-probs for"), ((math.nan,), "are not finite")])
def test_a_sampler_that_does_not_report_log_probs_is_refused(
    tmp_path: Path, prompts: list[Prompt], source: ModelSource, lm: Any, logps: tuple[float, ...], message: str
) -> None:
    stored = Round(tmp_path / "rounds" / "0000")
    with pytest.raises(InputError, match=f"`rollout.sampler`: .*{message}"):
        run_generate(stored, prompts, source, lm, Silent(*logps), per_token=True)
    assert not stored.shards("responses")


def test_seeds_differ_by_run_round_and_prompt() -> None:
    seeds = {prompt_seed(run, name, p) for run in (1, 2) for name in ("rounds/0000", "rounds/0001") for p in "ab"}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**62 for seed in seeds)


def test_a_shard_is_never_partially_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = Round(tmp_path / "lr=1e-5" / "0000")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        stored.write_shard("responses", 0, pa.table({"a": [1]}))
    assert stored.shards("responses") == {}
    monkeypatch.undo()
    stored.write_shard("responses", 0, pa.table({"a": [1]}))
    assert stored.read("responses").column_names == ["a"]


def test_batches_keep_to_the_token_budget() -> None:
    rows = [PrefixGroup([1] * n, ([2],)) for n in (3, 9, 4, 50, 7)]
    batches = list(batches_by_length(rows, 20))
    assert sorted(i for batch in batches for i in batch) == list(range(5))
    assert batches[0] == [3]  # a row over the budget is alone in its batch
    for batch in batches[1:]:
        assert len(batch) * max(len(rows[i]) for i in batch) <= 20


def test_held_out_metrics_by_hand(tmp_path: Path) -> None:
    """Prompt means before: 0, 1, 2; after: 1, 1, 4. Gains 1, 0, 2: mean 1, variance 1; one tie, two wins.

    Where all prompts tie, as the starting policy does with itself, there is no win rate.
    """
    store = RoundStore(tmp_path)
    for version, rewards in ((0, [0.0, 0.0, 1.0, 1.0, 1.5, 2.5]), (1, [0.5, 1.5, 1.0, 1.0, 4.0, 4.0])):
        stored = store.held_out(version)
        stored.write_shard("rewards", 0, pa.table({"prompt_id": list("aabbcc"), "reward": rewards}))
        stored.complete("rewards", mean=sum(rewards) / 6, seconds=0.0)
        stored.complete("responses", tokens_mean=3.0, finished_share=1.0, seconds=0.0)
    metrics = held_out_metrics(store, 1)
    assert metrics["val/reward_gain"] == pytest.approx(1.0)
    assert metrics["val/reward_gain_se"] == pytest.approx((1 / 3) ** 0.5)
    assert metrics["val/win_rate"] == pytest.approx(2.5 / 3)
    assert "val/win_rate" not in held_out_metrics(store, 0)
    assert metrics["val/reward_mean"] == pytest.approx(2.0)
