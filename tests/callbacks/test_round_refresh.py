"""Rounds are made, measured and logged in order, with any Trainer."""

import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from rlhf_pl import (
    OfflineDataModule,
    RebelLoss,
    RebelModule,
    RLOOLoss,
    RoundDataModule,
    SamplingConfig,
    SFTDataModule,
    SFTModule,
    TransformersSampler,
)
from rlhf_pl.callbacks import RoundRefresh
from rlhf_pl.utils.errors import InputError
from tests.callbacks.conftest import Log, SmallRun
from tests.callbacks.test_run_report import by_prompt
from tests.integration.test_fit import PROMPTS, assert_same, fit, reward, weights

Again = Callable[..., Any]


def no_reward(response: str) -> float:
    return 0.0


def without_times(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith(("time/", "system/"))}


@pytest.mark.parametrize("index", [0, 1])
def test_a_rounds_metrics_are_computed_from_its_responses(run: SmallRun, index: int) -> None:
    rows = run.rows("rounds", index)
    rewards, groups = [row["reward"] for row in rows], by_prompt(rows)
    step, logged = [(s, m) for s, m in run.log.metrics if "rollout/pairs" in m][index]
    assert step == sum(run.updates[:index])
    usable = sum(max(group) > min(group) for group in groups)
    assert 0 < usable < len(groups)
    assert without_times(logged) == pytest.approx(
        {
            "rollout/reward_mean": statistics.mean(rewards),
            "rollout/reward_std": statistics.pstdev(rewards),
            "rollout/reward_best": statistics.mean(map(max, groups)),
            "rollout/reward_worst": statistics.mean(map(min, groups)),
            "rollout/truncated": 0.0,
            "rollout/response_tokens": statistics.mean(len(row["response_tokens"]) for row in rows),
            "rollout/finished_share": statistics.mean(row["finished"] for row in rows),
            "rollout/pairs": usable,
        }
    )
    assert {"time/generate_s", "time/score_s", "time/logps_s", "system/resident_gib"} <= logged.keys()


@pytest.mark.parametrize("version", [0, 1, 2])
def test_the_policy_is_compared_with_the_starting_one_prompt_by_prompt(run: SmallRun, version: int) -> None:
    rows = run.rows("heldout", version)
    now, before = ([statistics.mean(g) for g in by_prompt(run.rows("heldout", v))] for v in (version, 0))
    gains = [a - b for a, b in zip(now, before, strict=True)]
    step, logged = [(s, m) for s, m in run.log.metrics if "val/reward_mean" in m][version]
    assert step == max(0, sum(run.updates[:version]) - 1)  # the last update of that policy
    found = without_times(logged)
    kl = {name: found.pop(name) for name in ("val/kl_new_old", "val/kl_new_old_se") if name in found}
    assert found == pytest.approx(
        {
            "val/reward_mean": statistics.mean(row["reward"] for row in rows),
            "val/reward_gain": statistics.mean(gains),
            "val/reward_gain_se": statistics.stdev(gains) / len(gains) ** 0.5,
            **({"val/win_rate": statistics.mean((g > 0) + (g == 0) / 2 for g in gains)} if any(gains) else {}),
            "val/response_tokens": statistics.mean(len(row["response_tokens"]) for row in rows),
            "val/finished_share": statistics.mean(row["finished"] for row in rows),
        }
    )
    assert len(kl) == (0 if version == 0 else 2)


def test_equal_rewards_give_no_win_rate_but_end_no_callback(
    tmp_path: Path, llama: Path, write_jsonl: Callable[..., str]
) -> None:
    log, early = Log(), EarlyStopping("val/win_rate", patience=5, mode="max")
    best = ModelCheckpoint(tmp_path / "best", monitor="val/win_rate", mode="max")
    options: dict[str, Any] = {"logger": log, "enable_checkpointing": True, "max_epochs": 1}
    fit(tmp_path, llama, write_jsonl(PROMPTS[:8]), [early, best], {"loss": RLOOLoss()},
        refresh={"reward": f"{__name__}.no_reward"}, **options)  # fmt: skip
    assert len(log.of("val/reward_mean")) == 2
    assert log.of("val/win_rate") == []
    assert float(early.best_score) == float(best.best_model_score or 0) == 0.5


def test_a_rounds_summary_is_the_mean_over_its_pairs(run: SmallRun) -> None:
    """Updates of 4 pairs and one of the remaining pairs, weighted by their pairs; also stored in the manifest."""
    updates = iter(run.log.of("train/loss"))
    for index, (step, loss) in enumerate(run.log.of("train/round_loss")):
        pairs = run.store.round(index).info("pairs")["pairs"]
        sizes = [4] * (pairs // 4) + [pairs % 4] * (pairs % 4 > 0)
        losses = [next(updates)[1] for _ in sizes]
        assert step == sum(run.updates[: index + 1]) - 1
        assert loss == pytest.approx(sum(a * b for a, b in zip(losses, sizes, strict=True)) / pairs)
        assert run.store.round(index).info("training")["loss"] == pytest.approx(loss)


def test_metrics_are_logged_in_the_order_of_a_round(run: SmallRun) -> None:
    marks = ("val/reward_mean", "rollout/pairs", "train/loss", "val/loss", "train/round_loss")
    order = [mark for _, metrics in run.log.metrics for mark in marks if mark in metrics]
    once = [mark for i, mark in enumerate(order) if i == 0 or order[i - 1] != mark]  # updates count as one
    a_round = ["rollout/pairs", "train/loss", "val/loss", "train/round_loss", "val/reward_mean"]
    assert once == ["val/reward_mean", *a_round, *a_round]
    assert run.printed.index("\nRound 1 of 2\n") < run.printed.index("\nRound 2 of 2\n")


def test_each_round_is_sampled_from_the_current_policy(run: SmallRun) -> None:
    stored = [run.store.round(i).manifest["settings"]["responses"] for i in range(2)]
    assert [settings["policy_step"] for settings in stored] == [0, run.updates[0]]
    assert stored[0]["weights"] != stored[1]["weights"]
    assert [row["prompt_id"] for row in run.rows("rounds", 0)] == [i for i in training_ids(run) for _ in range(4)]


def training_ids(run: SmallRun) -> list[str]:
    """Ids of the prompts that are not held out, in the order of the first round."""
    held_out = {row["prompt_id"] for row in run.rows("heldout", 0)}
    asked = list(dict.fromkeys(row["prompt_id"] for row in run.rows("rounds", 0)))
    assert sorted(asked) == sorted({str(row["prompt_id"]) for row in PROMPTS} - held_out)
    return asked


def test_prepared_rounds_train_without_a_sampler(run: SmallRun, again: Again) -> None:
    _, module = again(max_epochs=2)
    assert_same(weights(module), run.seen[-1])


def test_a_missing_prepared_round_ends_the_run(run: SmallRun, again: Again) -> None:
    reached: list[int] = []

    class Steps(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
            reached.append(trainer.global_step)

    with pytest.raises(InputError, match=r"Round \d is not in .*run, and can't be prepared without `rollout\.reward`"):
        again(Steps(), max_epochs=3)
    assert reached == [run.updates[0], sum(run.updates)]


class OverTwoRanks(TransformersSampler):
    ranks_per_engine = 2


def test_engines_over_more_ranks_than_the_run_has_are_refused(run: SmallRun, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"engines of 2 ranks each do not divide the 1 ranks of this run"):
        fit(tmp_path / "run", llama, run.prompts, refresh={"sampler": OverTwoRanks()})
    assert not (tmp_path / "run" / "rounds").exists()


def test_a_run_from_python_locks_its_directory(again: Again, tmp_path: Path) -> None:
    class Second(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
            owner = json.loads((tmp_path / "run" / ".lock").read_text())
            assert owner["pid"] == os.getpid()
            raise KeyError("the lock is there")

    with pytest.raises(KeyError, match="the lock is there"):
        again(Second())
    assert not (tmp_path / "run" / ".lock").exists()
    again()
    assert not (tmp_path / "run" / ".lock").exists()


def test_the_trainers_options_are_restored(run: SmallRun, again: Again) -> None:
    """Lightning does not see the limits while a round trains: the run stops after two micro-batches, one update."""
    trainer, _ = again(limit_train_batches=2, max_steps=100)
    assert trainer.global_step == 1
    assert (trainer.limit_train_batches, trainer.max_steps) == (2, 100)


def plain_trainer(folder: Path, *callbacks: L.Callback) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", default_root_dir=folder, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks),
    )  # fmt: skip


def test_other_modules_and_data_are_refused_by_name(llama: Path, tmp_path: Path, write_jsonl: Any) -> None:
    row = {"prompt": "Say it", "response": "It.", "chosen": "It.", "rejected": "No.", "chosen_reward": 1.0}
    file = write_jsonl([row | {"rejected_reward": 0.0}] * 4)
    rounds = RoundDataModule(file, max_prompt_tokens=64)
    for module, data, named in (
        (SFTModule(str(llama)), rounds, "SFTModule"),
        (RebelModule(str(llama)), OfflineDataModule(file), "OfflineDataModule"),
        (RebelModule(str(llama)), SFTDataModule(file), "SFTDataModule"),
    ):
        trainer = plain_trainer(tmp_path / "run", RoundRefresh(reward))
        with pytest.raises(InputError, match=named):
            trainer.fit(module, datamodule=data)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_num_responses": 0}, r"`rollout\.val_num_responses` must be 1 or more"),
        ({"prompts_per_shard": 0}, r"`rollout\.prompts_per_shard` must be 1 or more"),
        ({"logps_batch_tokens": 0}, r"`rollout\.logps_batch_tokens` must be 1 or more"),
        ({"timeout_minutes": 0}, r"`rollout\.timeout_minutes` must be above 0"),
    ],
)
def test_wrong_options_are_refused_at_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RoundRefresh(reward, **options)


def test_one_response_per_prompt_is_refused_where_the_loss_compares_them(llama: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {i}?"} for i in range(2)]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(map(json.dumps, rows)))
    for loss in (RebelLoss(), RLOOLoss()):
        trainer = plain_trainer(tmp_path / "run", RoundRefresh(reward, sampling=SamplingConfig(num_responses=1)))
        with pytest.raises(InputError, match=r"num_responses` is 1, but .* compares .* must be 2 or more"):
            trainer.fit(RebelModule(str(llama), loss), datamodule=RoundDataModule(str(prompts)))
    assert not (tmp_path / "run").exists()


def test_log_probs_of_another_policy_are_refused(run: SmallRun, llama: Path, tmp_path: Path) -> None:
    """If a round's log-probs were not the policy's, it would train on wrong log-ratios."""

    class Change(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, module: Any) -> None:
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.mul_(1.05)

    with pytest.raises(InputError, match=r"nats a token from those of the policy that trains on it"):
        fit(tmp_path, llama, run.prompts, callbacks=[Change()])


@pytest.mark.parametrize(
    ("sampling", "named"), [({"top_p": 0.9}, "top_p` is 0.9"), ({"top_k": 5}, "top_k` is 5"), ({"min_p": 0.1}, "min_p")]
)
def test_truncated_samplers_give_no_old_logps(sampling: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        RoundRefresh(reward, sampling=SamplingConfig(**sampling), old_logps="sampler")
    RoundRefresh(reward, sampling=SamplingConfig(**sampling))
