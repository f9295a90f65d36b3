"""The real command with importance weights: for its own sampler, and for rounds that another policy sampled."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from rlhf_pl import GRPOLoss, SamplingConfig
from rlhf_pl.algorithms.importance import ImportanceCorrection
from rlhf_pl.store.round_store import Round, RoundStore
from tests.algorithms import trained_round
from tests.algorithms.trained_round import Group, assert_same_training, logged, logged_losses, naive_updates
from tests.integration.test_fit import PROMPTS, assert_same, weights
from tests.integration.test_fit import fit as fit_trainer

GRPO = ("--model.loss", "GRPOLoss", "--rollout.sampling.temperature", "1")
CORRECTED = (*GRPO, "--model.loss.correction.high", "1.004", "--model.loss.correction.low", "0.998")
HALF = ("--rollout.sampler.dtype", "bfloat16")  # so that the sampler is not quite the policy
Fit = Callable[..., int]


@pytest.fixture(autouse=True)
def temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trained_round, "TEMPERATURE", 1.0)


def grpo(
    new: dict[int, Tensor],
    old: dict[int, Tensor],
    groups: list[Group],
    weight: Callable[[Tensor, Group], Tensor] | None = None,
) -> Tensor:
    """GRPO's loss response by response; `weight` gives that of each token from its log-weight and its row."""
    terms: list[Tensor] = []
    for group in groups:
        rewards = np.array([row["reward"] for row in group])
        for row, reward in zip(group, rewards, strict=True):
            advantage = (reward - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
            ratios = (new[id(row)] - old[id(row)]).exp()
            values = -torch.min(ratios * advantage, ratios.clamp(0.8, 1.2) * advantage)
            if weight is not None:
                values = values * weight(old[id(row)] - torch.tensor(row["sampler_token_logps"]), row)
            terms.append(values.mean())
    return torch.stack(terms).mean()


def limited(mode: str, level: str, low: float, high: float, log_weights: Tensor) -> Tensor:
    """Weights that are limited to [low, high], or 0 outside."""
    raw = (log_weights.sum().expand(len(log_weights)) if level == "sequence" else log_weights).exp()
    inside = (raw >= low) & (raw <= high)
    return torch.where(inside, raw, 0.0) if mode == "mask" else raw.clamp(low, high)


@pytest.mark.parametrize(
    ("mode", "level", "low", "high"),
    [
        pytest.param("truncate", "token", 0.998, 1.004, marks=pytest.mark.slow(minutes=0.2)),
        ("mask", "token", 0.998, 1.004),
        ("mask", "sequence", 0.9, 1.15),
    ],
)
def test_a_corrected_round_trains_like_the_naive_computation(
    fit: Fit, llama: Path, mode: str, level: str, low: float, high: float
) -> None:
    """The sampler is the policy in bfloat16; its log-probs are read from the stored responses."""
    limits = {"mode": mode, "level": level, "low": low, "high": high}
    options = [text for name, value in limits.items() for text in (f"--model.loss.correction.{name}", str(value))]
    assert fit(*GRPO, *options, *HALF, "--data.max_tokens_per_batch", "90") == 0
    seen: list[Tensor] = []

    def weight(log_weights: Tensor, row: Group) -> Tensor:
        seen.append(log_weights.detach())
        return limited(mode, level, low, high, log_weights.detach())

    losses, start, wanted = naive_updates(llama, 2, lambda new, old, groups: grpo(new, old, groups, weight))
    assert logged_losses() == pytest.approx(losses, rel=1e-3, abs=1e-5)
    assert_same_training(start, wanted)
    of_update = seen[: len(seen) // 2]
    raw = np.exp(np.array([v.sum() for v in of_update]) if level == "sequence" else torch.cat(of_update).numpy())
    for name, expected in {
        "sampling_weight": raw.mean(),
        "sampling_weight_var": raw.var(),
        "sampling_ess": raw.mean() ** 2 / (raw**2).mean(),
        "sampling_limited": ((raw < low) | (raw > high)).mean(),
    }.items():
        assert logged(f"train/{name}") == pytest.approx([expected, expected], rel=1e-3, abs=1e-6), name
    assert 0 < logged("train/sampling_limited")[0] < 1
    assert logged("train/first_logratio")[0] == 0  # pi_old is the training's own forward pass


@pytest.mark.exhaustive
@pytest.mark.slow(minutes=0.2)
def test_weights_of_the_same_computation_are_1(fit: Fit) -> None:
    """The sampler computes in float32 as the policy does, though in other batches: weights are 1 to 1e-5."""
    assert fit(*CORRECTED) == 0
    table = RoundStore("run").round(0).read("logps")
    for old, sampling in zip(*(table[f"{name}_token_logps"].to_pylist() for name in ("old", "sampling")), strict=True):
        assert old == pytest.approx(sampling, abs=1e-5)
    assert logged("train/sampling_weight") == pytest.approx([1, 1], abs=1e-5)
    assert logged("train/sampling_limited") == [0, 0]


def test_pi_old_may_be_the_sampler_token_by_token(fit: Fit, llama: Path) -> None:
    """The losses of two updates; the first ratios are those of the policy to the sampler in bfloat16."""
    assert fit(*GRPO, *HALF, "--rollout.old_logps", "sampler") == 0

    def from_sampler(new: dict[int, Tensor], old: dict[int, Tensor], groups: list[Group]) -> Tensor:
        return grpo(new, {id(r): torch.tensor(r["sampler_token_logps"]) for g in groups for r in g}, groups)

    losses, start, wanted = naive_updates(llama, 2, from_sampler)
    assert logged_losses() == pytest.approx(losses, rel=1e-3, abs=1e-5)
    assert_same_training(start, wanted)
    assert 0 < logged("train/first_logratio")[0] < 0.05
    stored = RoundStore("run").round(0)
    assert stored.info("logps")["policies"] == ["sampler"]
    assert stored.info("responses")["sampler_token_logps"] == {"temperature": 1.0, "truncation": "none", "unit": "nats"}


def rows_of(stored: Round) -> list[Group]:
    """The rows of a round with rewards, and its columns of log-probs, by prompt."""
    groups: dict[str, Group] = {}
    tables = (stored.read(stage).to_pylist() for stage in ("responses", "rewards"))
    logps = {(r["prompt_id"], r["response_index"]): r for r in stored.read("logps").to_pylist()}
    for row, scored in zip(*tables, strict=True):
        own = logps[row["prompt_id"], row["response_index"]]
        groups.setdefault(row["prompt_id"], []).append(row | {"reward": scored["reward"]} | own)
    return list(groups.values())


def test_rounds_of_another_policy_are_weighted(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    """Round 2 of `run` trains another run, whose own policy before that round is pi_old."""
    from transformers import AutoModelForCausalLM

    again = (*GRPO, "--rounds_from", "run", "--model.optimizer.lr", "0.02", "--model.loss.correction.high", "1.2")
    assert fit(*GRPO, "--trainer.max_epochs", "2") == 0
    for rounds in ("1", "2"):
        options = ("--trainer.default_root_dir", f"again{rounds}", "--trainer.max_epochs", rounds)
        assert fit(*again, *options, "--trainer.logger.save_dir", f"logs{rounds}") == 0
    assert capsys.readouterr().out.count("`model.loss.correction` weights the responses by pi_old / that policy") == 1
    first, second = (RoundStore("again2").round(i) for i in range(2))
    assert [r.info("logps")["policies"] for r in (first, second)] == [["old"], ["given", "old"]]
    assert first.read("logps")["sampling_token_logps"].equals(first.read("logps")["old_token_logps"])  # weights of 1
    source = {r["response"]: r for group in rows_of(RoundStore("run").round(1)) for r in group}
    lm = AutoModelForCausalLM.from_pretrained("again1/model").eval()
    distances = []
    for group in rows_of(second):
        for row in group:
            assert row["sampling_token_logps"] == source[row["response"]]["old_token_logps"]
            with torch.no_grad():
                own = trained_round.token_logps(lm, row)
            assert row["old_token_logps"] == pytest.approx(own.tolist(), abs=1e-4)
            distances += (own - torch.tensor(row["sampling_token_logps"])).tolist()
    raw = np.exp(distances)
    Path("logs").rename("logs_of_run")
    Path("logs2").rename("logs")
    assert logged("train/sampling_weight")[2:] == pytest.approx([raw.mean()] * 2, rel=1e-4)  # the updates of round 2
    assert logged("train/sampling_weight_var")[2:] == pytest.approx([raw.var()] * 2, rel=1e-2)
    assert logged("train/first_logratio") == [0, 0]
    assert raw.std() > 0.01
    # a third run takes the log-probs of the policy that sampled, not those of the second run
    third = ("--rounds_from", "again2", "--trainer.default_root_dir", "third", "--trainer.max_epochs", "2")
    assert fit(*GRPO, *third, "--model.optimizer.lr", "0.01") == 0
    taken = RoundStore("third").round(1).read("logps")["old_token_logps"]
    assert taken.to_pylist() == second.read("logps")["sampling_token_logps"].to_pylist()


@pytest.mark.exhaustive
@pytest.mark.slow(minutes=0.2)
def test_the_samplers_log_probs_are_preferred_over_those_of_pi_old(fit: Fit) -> None:
    """With those of the sampler in the other run's responses, weights are relative to what has sampled."""
    assert fit(*CORRECTED, *HALF, "--trainer.max_epochs", "2") == 0
    options = ("--rounds_from", "run", "--trainer.default_root_dir", "again", "--trainer.max_epochs", "2")
    assert fit(*CORRECTED, *options, "--model.optimizer.lr", "0.01") == 0
    stored = RoundStore("again").round(1)
    assert stored.info("logps")["policies"] == ["sampler", "old"]
    for group in rows_of(stored):
        for row in group:
            assert row["sampling_token_logps"] == row["sampler_token_logps"]


@pytest.mark.exhaustive
@pytest.mark.slow(minutes=0.2)
def test_every_response_has_its_log_probs_in_refilled_and_streamed_shards(fit: Fit) -> None:
    Path("partly_equal.py").write_text(  # a module is imported once under its name
        "def score(response, prompt_id):\n    return len(response) * (prompt_id > 'p3')\n"
    )
    refill = ("--rollout.refill", "2", "--rollout.prompts_per_shard", "1", "--rollout.stream_shards", "true")
    refill += ("--rollout.reward", "partly_equal.score")
    assert fit(*CORRECTED, *refill, "--data.prompts_per_round", "3", "--data.batch_size", "1") == 0
    stored = RoundStore("run").round(0)
    assert stored.info("responses")["refilled"] > 0
    assert len(stored.shards("responses")) > 2
    for row in stored.read("responses").to_pylist():
        assert len(row["sampler_token_logps"]) == len(row["response_tokens"])
        assert sum(row["sampler_token_logps"]) == pytest.approx(row["sampler_logp"], abs=1e-4)


@pytest.mark.exhaustive
@pytest.mark.slow(minutes=0.2)
def test_a_run_that_needs_more_of_its_responses_says_what_to_do(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the correction a run goes on; with it, responses that lack the sampler's log-probs are refused."""
    assert fit(*GRPO) == 0
    assert fit(*CORRECTED, "--trainer.max_epochs", "2") == 1
    assert "sampler_token_logps: None -> stored" in capsys.readouterr().err
    assert fit(*CORRECTED, "--trainer.max_epochs", "2", "--accept_changes") == 0
    assert "sampling_token_logps" in RoundStore("run").round(1).read("logps").column_names
    assert fit(*CORRECTED, "--trainer.default_root_dir", "other") == 0
    assert fit(*GRPO, "--trainer.default_root_dir", "other", "--trainer.max_epochs", "2") == 0
    columns = [RoundStore("other").round(i).read("responses").column_names for i in range(2)]
    assert ["sampler_token_logps" in names for names in columns] == [True, False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*CORRECTED, "--rollout.old_logps", "sampler"), "pi_old would be the sampler, and all weights 1"),
        ((*CORRECTED, "--rollout.sampling.temperature", "0.9"), "`model.loss.correction`), but `rollout.sampling.temp"),
        ((*CORRECTED, "--rollout.sampling.top_p", "0.9"), "`rollout.sampling.top_p` is 0.9 (off: 1): responses are"),
        ((*GRPO, "--rollout.old_logps", "sampler", "--rollout.store_token_logps", "true"), "so that no forward pass"),
    ],
)
def test_what_does_not_fit_a_correction_is_refused(
    fit: Fit, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert fit(*arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("error: ") == 1
    assert not Path("run").exists()


@pytest.mark.exhaustive
@pytest.mark.slow(minutes=0.2)
def test_rounds_that_lack_what_a_correction_needs_are_refused(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a run that stored sums alone; of one that sampled from a part of the vocabulary; and without a sampler."""
    plain, options = ("--model.loss", "RebelLoss", "--rollout.sampling.temperature", "1"), ("--trainer.max_epochs", "2")
    again = (*CORRECTED, *options, "--trainer.default_root_dir", "again", "--rounds_from")
    assert fit(*plain, *options) == 0
    assert fit(*again, "run") == 1
    assert "sums over responses, but none of each token" in capsys.readouterr().err
    other = (*GRPO, *again[len(CORRECTED) :])
    assert fit(*other, "run", "--rollout.old_logps", "sampler") == 1
    assert "were sampled without log-probs. Set it to policy" in capsys.readouterr().err
    assert fit(*plain, "--trainer.default_root_dir", "part", "--rollout.sampling.top_p", "0.9") == 0
    assert fit(*CORRECTED, "--trainer.default_root_dir", "again", "--rounds_from", "part") == 1
    assert "`rollout.sampling.top_p` is 0.9 (off: 1) there" in capsys.readouterr().err
    assert not Path("again").exists()


class Stop(L.Callback):
    """Ends the process before an update."""

    def __init__(self, update: int) -> None:
        self.update = update

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.update:
            raise KeyboardInterrupt


@pytest.mark.exhaustive
@pytest.mark.slow(minutes=0.2)
def test_a_kill_inside_a_round_changes_nothing(tmp_path: Path, llama: Path) -> None:
    """Stopped in the second round, whose sampler is not quite the policy, and started again: equal weights."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))

    def run(name: str, *callbacks: Any, **more: Any) -> dict[str, Tensor]:
        from rlhf_pl import TransformersSampler

        saved = ModelCheckpoint(tmp_path / name / "checkpoints", every_n_train_steps=1, save_last=True)
        loss = GRPOLoss(correction=ImportanceCorrection("truncate", "token", 1.004, 0.998))
        sampling = SamplingConfig(num_responses=3, max_response_tokens=8)
        refresh = {"sampling": sampling, "sampler": TransformersSampler("bfloat16")}
        options = {"module": {"loss": loss}, "refresh": refresh, "enable_checkpointing": True, "max_epochs": 2}
        _, module = fit_trainer(
            tmp_path / name, llama, str(tmp_path / "prompts.jsonl"), [*callbacks, saved], **options, **more
        )
        return weights(module)

    whole = run("whole")
    updates = sum(math.ceil(RoundStore(tmp_path / "whole").round(i).info("pairs")["groups"] / 4) for i in range(2))
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        run("killed", Stop(updates - 1))
    assert_same(run("killed", ckpt_path="last"), whole)
