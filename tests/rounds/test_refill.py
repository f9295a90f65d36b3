"""Rounds that sample further prompts in place of those that give nothing to train on."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from rlhf_pl.__main__ import main
from rlhf_pl.algorithms.pair_selection import BestWorst
from rlhf_pl.algorithms.reward_shaping import RewardShaping
from rlhf_pl.callbacks import RoundRefresh
from rlhf_pl.cli.rounds import describe_state
from rlhf_pl.data.prompts import Prompt, take_prompts
from rlhf_pl.rollout import TransformersSampler
from rlhf_pl.rounds.metrics import round_metrics
from rlhf_pl.rounds.refill import check_refill, open_wave, plan_first_wave
from rlhf_pl.rounds.stages import count_usable, prompt_seed, select
from rlhf_pl.rounds.stages.generate import RESPONSES
from rlhf_pl.store.round_store import STAGES, Round, RoundStore
from rlhf_pl.store.waves import shard_ranges
from rlhf_pl.utils.errors import InputError

REWARD = """
def ties(response, prompt_id):
    return len(set(response)) / 10 if int(prompt_id[1:]) % 3 == 0 else 1.0
"""
PROMPTS, WANTED = 30, 4
Fit = Callable[..., int]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refill")
    rows = [{"prompt_id": f"p{i}", "prompt": f"What is {i} plus {i}?"} for i in range(PROMPTS)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "reward.py").write_text(REWARD)
    return folder


@pytest.fixture(scope="module")
def fit(folder: Path, llama: Path) -> Fit:
    """Two rounds of 4 of 30 prompts in shards of 3; only every third prompt has responses of different rewards."""
    options = {
        **{"model.policy": llama, "model.optimizer.lr": "1e-3", "data.prompts": folder / "prompts.jsonl"},
        **{"data.max_prompt_tokens": 64, "data.prompts_per_round": WANTED, "data.batch_size": 1},
        **{"data.val_prompts": 0},
        **{"rollout.reward": f"{folder}/reward.py:ties", "rollout.sampler": "TransformersSampler"},
        **{"rollout.sampler.dtype": "float32", "rollout.sampling.max_response_tokens": 6, "rollout.refill": 2},
        **{"rollout.sampling.num_responses": 3, "rollout.prompts_per_shard": 3, "trainer.max_epochs": 2},
        **{"trainer.accelerator": "cpu", "trainer.enable_progress_bar": "false"},
    }

    def run(name: str, **changes: object) -> int:
        settings = options | {name.replace("__", "."): value for name, value in changes.items()}
        listed = [str(text) for name, value in settings.items() for text in (f"--{name}", value)]
        return main(["fit", *listed, "--trainer.default_root_dir", str(folder / name)])

    return run


@pytest.fixture(scope="module")
def run(fit: Fit, folder: Path) -> Path:
    """A finished run."""
    assert fit("run", checkpoint__keep_rounds=2) == 0
    return folder / "run"


def unique_prompts(stored: Round, stage: str = "responses") -> list[str]:
    return stored.read(stage)["prompt_id"].unique().to_pylist()


def prompts_with_a_difference(stored: Round) -> set[str]:
    """By the stored rewards alone."""
    rewards: dict[str, set[float]] = {}
    for row in stored.read("rewards").to_pylist():
        rewards.setdefault(row["prompt_id"], set()).add(row["reward"])
    return {prompt_id for prompt_id, values in rewards.items() if len(values) > 1}


def test_further_prompts_take_the_place_of_ties(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Waves, order and seeds are those that the seed and the stored rewards give; rounds share no prompt."""
    order = [f"p{i}" for i in range(PROMPTS)]
    random.Random("1:0").shuffle(order)
    position = 0
    for index, stored in RoundStore(run).rounds().items():
        useful, waves = prompts_with_a_difference(stored), [WANTED]
        while len(waves) < 3:
            waves.append(WANTED - len(useful & set(order[position : position + sum(waves)])))
        waves = [count for count in waves if count]
        assert len(waves) > 1
        sampled = order[position : position + sum(waves)]
        assert unique_prompts(stored) == unique_prompts(stored, "rewards") == sampled
        assert set(unique_prompts(stored, "pairs")) == useful
        for row in stored.read("responses").to_pylist():
            assert row["seed"] == prompt_seed(1, f"rounds/000{index}", row["prompt_id"]) + row["response_index"]
        info = stored.info("responses")
        assert (info["waves"], info["refilled"]) == (waves, sum(waves[1:]))
        assert round_metrics(stored)["rollout/refilled_prompts"] == sum(waves[1:])
        assert stored.info("pairs")["dropped"]["no_reward_difference"] == sum(waves) - len(useful)
        assert len(stored.shards("responses")) == len(stored.shards("rewards")) == sum(-(-n // 3) for n in waves)
        assert describe_state(stored) == "complete"
        position += sum(waves)
    assert main(["rounds", str(run)]) == 0
    text = capsys.readouterr().out
    assert f"round 2, prompts refilled: {sum(waves[1:])} ({' + '.join(map(str, waves))})" in text


def interrupt(monkeypatch: pytest.MonkeyPatch, method: str, when: str) -> None:
    """Fail a run at its next call of a method of a training round."""
    original, fails = getattr(Round, method), [True]

    def interrupted(stored: Round, *args: Any, **kwargs: Any) -> None:
        if when == "after":
            original(stored, *args, **kwargs)
        if fails:
            fails.pop()
            raise InputError("interrupted")
        if when == "before":
            original(stored, *args, **kwargs)

    monkeypatch.setattr(Round, method, interrupted)


def test_an_interrupted_run_has_the_same_files(
    run: Path, fit: Fit, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and after a wave is added, after a shard of it, after its scores, and before the selection."""
    points = [("extend", "before"), ("extend", "after"), ("write_shard", "after"), ("complete", "before")]
    for method, when in points:
        with monkeypatch.context() as patches:
            interrupt(patches, method, when)
            assert fit("broken", trainer__max_epochs=1) == 1
    assert fit("broken", trainer__max_epochs=1) == 0
    whole, broken = RoundStore(run).round(0), RoundStore(folder / "broken").round(0)
    for stage in STAGES:
        assert [file.name for file in broken.shards(stage).values()] == [f.name for f in whole.shards(stage).values()]
    for key in ("refill", "prompts", "prompts_per_shard"):
        assert broken.manifest[key] == whole.manifest[key]


def test_a_change_after_the_fact_samples_no_further_prompts(
    run: Path, fit: Fit, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A selector that finds no pair, and another normalisation, select from what is stored."""
    shutil.copytree(run, folder / "changed", symlinks=True)
    sampled: list[object] = []
    monkeypatch.setattr(TransformersSampler, "generate", lambda sampler, prompts, sampling: sampled.append(prompts))
    stored = RoundStore(folder / "changed").round(1)
    before = unique_prompts(stored)
    assert fit("changed", checkpoint__keep_rounds=2, rollout__selector__min_margin=9) == 0
    assert stored.info("pairs")["pairs"] == 0
    assert fit("changed", checkpoint__keep_rounds=2, rollout__shaping__normalize="round") == 0
    assert set(unique_prompts(stored, "pairs")) == prompts_with_a_difference(stored)
    assert (unique_prompts(stored), sampled) == (before, [])
    assert fit("changed", rollout__refill=1) == 1  # refused: it determines what is sampled


def store_rewards(
    stored: Round, rewards: dict[str, list[float | None]], shard: int = 0, truncated: tuple[tuple[str, int], ...] = ()
) -> None:
    """Write responses of different tokens, and their rewards, as a shard; those of `truncated` are not finished."""
    rows = [(prompt_id, i, reward) for prompt_id, group in rewards.items() for i, reward in enumerate(group)]
    columns = {"prompt_id": [r[0] for r in rows], "response_index": [r[1] for r in rows]}
    responses = columns | {
        "response_tokens": [[i] for _, i, _ in rows],
        "finished": [r[:2] not in truncated for r in rows],
    }
    empty = {name: [None] * len(rows) for name in RESPONSES.names if name not in responses}
    stored.write_shard("responses", shard, pa.table(responses | empty, schema=RESPONSES))
    scores = pa.array([r[2] for r in rows], pa.float64())
    stored.write_shard("rewards", shard, pa.table({**columns, "reward": scores}))


def test_usable_prompts_are_counted_by_the_shaped_rewards_of_all_waves(tmp_path: Path) -> None:
    """With a margin of one standard deviation, a wave of extreme rewards makes the first prompt useless."""
    stored = Round(tmp_path / "rounds" / "0000")
    how = (BestWorst(min_margin=1.0), 1, None, RewardShaping(normalize="round"), False, True, False)
    store_rewards(stored, {"a": [0.0, 1.0], "b": [0.0, 0.0], "c": [1.0, None]})  # deviation 0.49
    assert count_usable(stored, *how) == 1
    store_rewards(stored, {"d": [-10.0, 10.0]}, 1)
    assert count_usable(stored, *how) == 1
    select(stored, *how)
    assert unique_prompts(stored, "pairs") == ["d"]
    assert stored.info("pairs")["dropped"] == {"no_reward_difference": 2, "same_answer": 0, "not_scored": 1}


@pytest.mark.parametrize("selector", [BestWorst(), None])
def test_prompts_with_a_truncated_response_are_dropped_before_shaping(
    tmp_path: Path, selector: BestWorst | None
) -> None:
    """One of `a` is truncated, and one of `c` that has no reward; `b` and `d` alone give the round's mean, 1."""
    stored = Round(tmp_path / "rounds" / "0000")
    rewards = {"a": [0.0, 9.0], "b": [0.0, 2.0], "c": [1.0, 5.0, None], "d": [1.0, 1.0]}
    store_rewards(stored, rewards, truncated=(("a", 0), ("c", 2)))
    how = (selector, 1, None, RewardShaping(normalize="round"), False, True, True, 2)
    assert (count_usable(stored, *how), count_usable(stored, *how, True)) == (3, 1)
    select(stored, *how, True)
    assert unique_prompts(stored, "pairs") == ["b"]
    info = stored.info("pairs")
    assert (info["prompts"], info["penalties"]["round_mean"]) == (4, 1.0)
    assert {reason: count for reason, count in info["dropped"].items() if count} == {
        "no_reward_difference": 1,
        "truncated_response": 2,
    }


def test_groups_without_a_difference_are_left_out(tmp_path: Path) -> None:
    """Of a loss on groups; without refill all groups are kept."""
    stored = Round(tmp_path / "rounds" / "0000")
    store_rewards(stored, {"a": [0.0, 1.0, 1.0], "b": [2.0, 2.0, 2.0], "c": [None, 1.0, None], "d": [1.0, None, 1.0]})
    plain = (None, 1, None, RewardShaping(), False, True)
    assert count_usable(stored, *plain, True) == 1
    select(stored, *plain, True)
    assert stored.read("pairs")["response_index"].to_pylist() == [0, 1, 2]
    assert stored.info("pairs")["dropped"] == {"no_reward_difference": 2, "same_answer": 0, "not_scored": 1}
    assert count_usable(stored, *plain, False) == 3


def make_data(folder: Path, per_round: int, total: int) -> Any:
    prompts = [Prompt(f"p{i}", []) for i in range(total)]
    return SimpleNamespace(train_prompts=prompts, prompts_per_round=per_round, seed=1, store=RoundStore(folder))


def start_round(data: Any, index: int, refill: int) -> tuple[Round, Any]:
    """A new round whose first prompts are complete, and its options."""
    stored, options = data.store.round(index), SimpleNamespace(refill=refill)
    counts = {"prompts_per_shard": 2, "prompts": {"in_round": data.prompts_per_round}}
    stored.update(settings={}, **counts, **plan_first_wave(data, options, index, 2))
    for stage in ("responses", "rewards"):
        stored.complete(stage, seconds=1.0)
    return stored, options


def test_refilling_ends_where_the_prompts_do(tmp_path: Path) -> None:
    """Over the end of the shuffled order a round takes prompts of the next one, but none twice."""
    data = make_data(tmp_path, per_round=4, total=10)
    stored, options = start_round(data, 0, refill=9)
    assert open_wave(stored, data, options, lambda: 1, lambda count: 2)
    assert shard_ranges(stored.manifest, 7) == [range(2), range(2, 4), range(4, 6), range(6, 7)]
    assert not stored.is_complete("responses")
    assert not stored.is_complete("rewards")
    stored.complete("responses", seconds=2.0)
    assert stored.info("responses")["seconds"] == 3.0
    stored.complete("rewards", seconds=2.0)
    assert not open_wave(stored, data, options, lambda: 4, lambda count: 2)
    assert not open_wave(stored, data, options, lambda: 0, lambda count: 2)  # complete, whatever is changed
    assert stored.manifest["refill"]["end"] == 7

    stored, options = start_round(data, 1, refill=9)
    assert stored.manifest["refill"]["start"] == 7
    added = 0
    while open_wave(stored, data, options, lambda: 0, lambda count: 2):
        added += 1
    assert added == 2
    assert [wave["prompts"] for wave in stored.manifest["refill"]["waves"]] == [4, 4, 2]
    assert stored.manifest["prompts"]["in_round"] == 10
    assert len({p.prompt_id for p in take_prompts(data.train_prompts, 7, 10, seed=1)[0]}) == 10


def test_a_round_begins_where_the_one_before_ended(tmp_path: Path) -> None:
    data = make_data(tmp_path, per_round=4, total=100)
    start_round(data, 0, refill=0)
    assert "refill" not in data.store.round(0).manifest
    stored, options = start_round(data, 1, refill=2)  # turned on
    assert stored.manifest["refill"]["start"] == 4
    assert open_wave(stored, data, options, lambda: 1, lambda count: 2)
    assert start_round(data, 2, refill=0)[0].manifest["refill"] == {  # turned off
        "start": 11,
        "end": 15,
        "waves": [{"prompts": 4, "prompts_per_shard": 2}],
    }
    # round 3 is lost: it had at most 3 x 4 prompts
    assert start_round(data, 4, refill=2)[0].manifest["refill"]["start"] == 15 + 12


@pytest.mark.parametrize(
    ("per_round", "uses_pairs", "needs", "message"),
    [
        (None, True, ["rewards"], "prompts_per_round` is null: every round samples all 10 training prompts"),
        (10, True, ["rewards"], "prompts_per_round` is 10: every round samples all 10 training prompts"),
        (4, False, ["old_logps"], "reads no rewards"),
    ],
)
def test_refill_without_an_effect_is_refused(
    tmp_path: Path, per_round: int | None, uses_pairs: bool, needs: list[str], message: str
) -> None:
    module: Any = SimpleNamespace(loss=SimpleNamespace(uses_pairs=uses_pairs), needs=needs)
    data, off, on = (
        make_data(tmp_path, per_round or 0, 10),
        SimpleNamespace(refill=0),
        SimpleNamespace(refill=1, from_other_run=False, drop_truncated=False),
    )
    data.prompts_per_round = per_round
    check_refill(module, data, off)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=message):
        check_refill(module, data, on)  # type: ignore[arg-type]
    data.prompts_per_round, module.needs = 4, ["rewards"]
    check_refill(module, data, on)  # type: ignore[arg-type]


def test_refill_of_stored_rounds_is_refused() -> None:
    with pytest.raises(InputError, match=r"without `rollout.reward` no prompts are sampled"):
        RoundRefresh(refill=1)
