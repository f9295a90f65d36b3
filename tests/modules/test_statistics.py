"""Metrics of a run equal values worked by hand and by plain transformers."""

import csv
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from rlhf_pl import BestWorst, RandomPair, SamplingConfig, VLLMSampler
from rlhf_pl.algorithms.reward_shaping import break_ties
from rlhf_pl.callbacks import DegenerationGuard, HFExport, RoundCheckpoint
from rlhf_pl.data.micro_batches import MicroBatchSampler
from rlhf_pl.data.update_plan import UpdatePlan
from rlhf_pl.distributed.ranks import Ranks
from rlhf_pl.modules.logging import Means, with_variance
from rlhf_pl.rollout import VLLMServerSampler
from rlhf_pl.rollout.served_engine import ServedEngine
from rlhf_pl.rounds.stages.kl import estimate_kl
from rlhf_pl.store.round_store import Round, RoundStore
from rlhf_pl.utils.errors import InputError
from tests.integration.test_fit import PROMPTS, fit
from tests.stored_pairs import read_pairs

SAMPLING = SamplingConfig(num_responses=3, max_response_tokens=8, temperature=0.9)


@pytest.fixture
def prompts(write_jsonl: Callable[..., str]) -> str:
    return write_jsonl(PROMPTS)


def column(folder: Path, name: str) -> list[float]:
    with open(folder / "csv" / "metrics.csv") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def plain_logps(folder: Path, rows: list[dict[str, Any]], temperature: float) -> list[float]:
    """Log-prob of each row's response under an exported model, by eager transformers, row by row, in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    found = []
    for row in rows:
        prompt, response = row["prompt_tokens"], row["response_tokens"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        logps = (logits / temperature).log_softmax(-1)
        found.append(float(logps[range(len(response)), response].double().sum()))
    return found


def expected_kl(rows: list[dict[str, Any]], new: list[float], other: list[float]) -> tuple[float, float]:
    """Mean over prompts of the mean log-ratio of a prompt's responses, and its standard error."""
    by_prompt: dict[str, list[float]] = {}
    for row, a, b in zip(rows, new, other, strict=True):
        by_prompt.setdefault(row["prompt_id"], []).append(a - b)
    means = [sum(ratios) / len(ratios) for ratios in by_prompt.values()]
    return sum(means) / len(means), statistics.stdev(means) / len(means) ** 0.5


@pytest.mark.parametrize("kl_coef", [0.0, 0.05])
def test_kl_of_the_new_policy_comes_from_its_held_out_responses(
    tmp_path: Path, llama: Path, prompts: str, kl_coef: float
) -> None:
    """KL(new || old) and KL(new || reference) by plain transformers, from the exported models of every round."""
    exports = HFExport(dtype="float32", every_round=True)
    fit(tmp_path, llama, prompts, [exports], {"kl_coef": kl_coef}, refresh={"sampling": SAMPLING})
    store = RoundStore(tmp_path)
    models = [llama, tmp_path / "model-round-1", tmp_path / "model-round-2"]
    for version in (1, 2):
        rows = store.held_out(version).read("responses").to_pylist()
        logps = [plain_logps(folder, rows, 0.9) for folder in models]
        found = store.held_out(version).info("kl")
        kl, error = expected_kl(rows, logps[version], logps[version - 1])
        assert (found["new_old"], found["new_old_se"]) == pytest.approx((kl, error), abs=1e-4)
        assert kl > 0.05
        if kl_coef:
            kl, error = expected_kl(rows, logps[version], logps[0])
            assert (found["new_reference"], found["new_reference_se"]) == pytest.approx((kl, error), abs=1e-4)
        else:
            assert "new_reference" not in found
        assert column(tmp_path, "val/kl_new_old")[version - 1] == pytest.approx(found["new_old"])
    assert not store.held_out(0).is_complete("kl")


def test_greedy_held_out_responses_give_no_kl_estimate(tmp_path: Path, llama: Path, prompts: str) -> None:
    fit(tmp_path, llama, prompts, refresh={"val_num_responses": 1, "val_temperature": 0.0}, max_epochs=1)
    assert not RoundStore(tmp_path).held_out(1).is_complete("kl")


def test_estimate_and_its_error() -> None:
    """Prompt means 2 and 5: mean 3.5, standard deviation 3 / sqrt(2), error 1.5. One prompt has no error."""
    assert estimate_kl([[1.0, 3.0], [5.0]]) == pytest.approx((3.5, 1.5))
    assert estimate_kl([[1.0, 3.0]]) == (2.0, 0.0)


class Stop(L.Callback):
    """Ends the run as Ctrl-C does, before its third update."""

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == 2:
            raise KeyboardInterrupt


def test_a_rounds_kl_is_that_of_all_its_pairs(tmp_path: Path, llama: Path, prompts: str) -> None:
    """Updates of 4, 4 and the remaining pairs, weighted by their pairs; the same after a stop inside the round.

    The new policy's estimate needs pi_old, which a resumed run reads from disk.
    """
    numbers = []
    for name in ("whole", "parts"):
        folder = tmp_path / name
        settings: dict[str, Any] = {"max_epochs": 1, "enable_checkpointing": True}
        checkpoint = RoundCheckpoint(every_n_updates=1)
        if name == "parts":
            with pytest.raises(SystemExit):
                fit(folder, llama, prompts, [checkpoint, Stop()], **settings)
            settings["ckpt_path"] = str(folder / "checkpoints" / "last.ckpt")
            checkpoint = RoundCheckpoint(every_n_updates=1)
        fit(folder, llama, prompts, [checkpoint, DegenerationGuard(max_kl=1e-9)], **settings)
        stored = RoundStore(folder).round(0)
        numbers.append((stored.info("training"), RoundStore(folder).held_out(1).info("kl")))
        assert f"KL(old || new) {stored.info('training')['kl']:.1f}" in stored.manifest["warnings"]["kl"]
    pairs = RoundStore(tmp_path / "whole").round(0).info("pairs")["pairs"]
    updates = column(tmp_path / "whole", "train/kl")
    sizes = [4] * (pairs // 4) + ([pairs % 4] if pairs % 4 else [])
    expected = sum(kl * size for kl, size in zip(updates, sizes, strict=True)) / pairs
    (whole, of_whole), (parts, of_parts) = numbers
    assert whole["kl"] == pytest.approx(expected)
    assert whole["kl"] != pytest.approx(updates[-1])
    assert column(tmp_path / "whole", "train/round_kl") == [pytest.approx(expected)]
    assert parts["kl"] == pytest.approx(whole["kl"], rel=1e-5)
    assert of_parts["new_old"] == pytest.approx(of_whole["new_old"], abs=1e-5)


@pytest.mark.parametrize("old_logps", ["policy", "sampler"])
def test_an_unchanged_policy_has_no_kl_at_any_held_out_temperature(
    tmp_path: Path, llama: Path, prompts: str, old_logps: str
) -> None:
    """With lr 0, val/loss is eta^2 times the mean squared reward margin, whatever the temperatures."""
    from rlhf_pl.optim import AdamW

    refresh = {
        "sampling": SamplingConfig(num_responses=3, max_response_tokens=8),
        "val_temperature": 0.4,
        "val_num_responses": 3,
        "old_logps": old_logps,
    }
    module = {"optimizer": lambda p: AdamW(p, lr=0.0)}
    fit(tmp_path, llama, prompts, module=module, refresh=refresh, max_epochs=1)
    assert column(tmp_path, "val/kl") == [pytest.approx(0, abs=1e-4)]
    pairs = RoundStore(tmp_path).held_out(0).read("pairs").to_pylist()
    margins = [pair["chosen_reward"] - pair["rejected_reward"] for pair in pairs]
    expected = sum((2.0 * margin) ** 2 for margin in margins) / len(margins)
    assert column(tmp_path, "val/loss") == [pytest.approx(expected, rel=1e-3)]
    assert column(tmp_path, "val/kl_new_old") == [pytest.approx(0, abs=1e-6)]


def test_stored_sampler_logps_are_described(tmp_path: Path, llama: Path, prompts: str) -> None:
    refresh = {"sampling": SamplingConfig(num_responses=3, max_response_tokens=8), "old_logps": "sampler"}
    fit(tmp_path, llama, prompts, refresh=refresh, max_epochs=1)
    stored = RoundStore(tmp_path).round(0)
    assert stored.info("responses")["sampler_logp"] == {"temperature": 1.0, "truncation": "none", "unit": "nats"}
    metadata = stored.read_shard("responses", 0).schema.field("sampler_logp").metadata
    assert (metadata[b"temperature"], metadata[b"truncation"]) == (b"1.0", b"none")


@pytest.mark.parametrize(
    "arguments",
    [
        {"override_generation_config": {"repetition_penalty": 1.2}},
        {"logits_processors": ["package:Processor"]},
        {"logprobs_mode": "processed_logprobs"},
        {"speculative_config": {"method": "ngram", "rejection_sample_method": "synthetic"}},
    ],
)
def test_engines_that_reshape_give_no_old_logps(
    tmp_path: Path, llama: Path, prompts: str, arguments: dict[str, Any]
) -> None:
    sampler = VLLMSampler(engine_args=arguments)
    refresh = {"sampler": sampler, "sampling": SamplingConfig(num_responses=2), "old_logps": "sampler"}
    with pytest.raises(InputError, match=f"`rollout.sampler`: engine_args.{next(iter(arguments))} is"):
        fit(tmp_path, llama, prompts, refresh=refresh)
    assert not (tmp_path / "rounds").exists()


def test_variance_is_over_all_values() -> None:
    """Ratios 1, 3 and 2, 6 in two micro-batches: mean 3, squares 1, 9, 4, 36: variance 50 / 4 - 9."""
    means = Means()
    for chosen, rejected in ((1.0, 3.0), (2.0, 6.0)):
        shifted = torch.tensor([[chosen - 1], [rejected - 1]])
        means.add(ratio=shifted.mean(0), ratio_square=shifted.square().mean(0))
    assert with_variance(means.compute_and_reset("train", Ranks()), "train/ratio") == {
        "train/ratio_mean": pytest.approx(3.0),
        "train/ratio_var": pytest.approx(3.5),
    }


def test_logged_ratio_variance_is_over_all_responses_of_an_update(tmp_path: Path, llama: Path, prompts: str) -> None:
    """Micro-batches of 2 pairs, 2 an update: variance of the ratios of all responses, by hand."""
    updates: list[list[float]] = [[]]

    class Recorder(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, index: int) -> None:
            with torch.no_grad():
                logps = batch.rows.sum_per_response(module(**batch.rows.inputs(), temperature=batch.temperature))
            updates[-1] += (logps - batch.stored["old_logps"]).exp().tolist()

        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == len(updates):
                updates.append([])

    fit(tmp_path, llama, prompts, [Recorder()], max_epochs=1)
    expected = [statistics.pvariance(ratios) for ratios in updates if ratios]
    assert column(tmp_path, "train/ratio_var") == pytest.approx(expected, rel=1e-4, abs=1e-9)
    assert max(expected) > 1e-3


def test_ties_that_the_kl_term_breaks_are_kept(tmp_path: Path, llama: Path, prompts: str) -> None:
    """Most rewards tie: ties are dropped in round 1, where the policy is the reference, and kept in round 2."""

    def fit_with(folder: Path, kl_coef: float, **refresh: Any) -> list[Round]:
        fit(
            folder,
            llama,
            prompts,
            module={"kl_coef": kl_coef},
            data={"val_prompts": 0},
            refresh={"reward": reward_finished, "sampling": SAMPLING, **refresh},
        )
        return list(RoundStore(folder).rounds().values())

    for name, selector in (("best", BestWorst()), ("random", RandomPair())):
        first, second = fit_with(tmp_path / name, 0.05, selector=selector)
        assert first.info("pairs")["dropped"]["no_reward_difference"] > 0
        dropped = second.info("pairs")["dropped"]
        assert dropped["no_reward_difference"] == 0
        assert second.info("pairs")["kept_ties"] > 0
        for pair in read_pairs(second):
            terms = [pair[f"{w}_old_logp"] - pair[f"{w}_reference_logp"] for w in ("chosen", "rejected")]
            assert pair["chosen_tokens"] != pair["rejected_tokens"]
            assert terms[0] != terms[1]
    assert fit_with(tmp_path / "plain", 0.0)[1].info("pairs")["dropped"]["no_reward_difference"] > 0


def reward_finished(response_tokens: Any) -> float:
    """1 for a finished response; most rewards tie."""
    return float(len(response_tokens) < 8)


def test_broken_ties_keep_the_order_and_equal_responses_tied() -> None:
    rewards, responses = [1.0, 0.0, 1.0, 0.0, 1.0], [(1,), (2,), (3,), (4,), (1,)]
    broken = break_ties(rewards, responses, seed=3)
    assert broken == pytest.approx(rewards, abs=1e-12)
    assert broken[0] == broken[4]
    assert len(set(broken)) == 4
    assert max(broken[1], broken[3]) < min(broken[0], broken[2])


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("max_tokens", [None, 60])
@pytest.mark.parametrize("pairs", [1, 5, 11, 12, 13, 25, 47])
def test_an_update_has_each_pair_at_most_once(pairs: int, max_tokens: int | None, world_size: int) -> None:
    """4 passes in updates of 12 pairs: every pair occurs 4 times, and all updates but the last are full."""
    passes, size = 4, 12
    plan = UpdatePlan(passes * pairs, 2, 6 // world_size, world_size, max_tokens, passes)
    lengths = [5 + 7 * (i % 4) for i in range(pairs)] if max_tokens else None
    ranks = [MicroBatchSampler(plan, "x", rank, lengths) for rank in range(world_size)]
    count = ranks[0].accumulate
    batches = [list(r) for r in ranks]
    assert len({len(b) for b in batches}) == 1
    updates = []
    for start in range(0, len(batches[0]), count):
        here = [b for of_rank in batches for b in of_rank[start : start + count]]
        update = [i for indices, (weight,) in here for i in indices if weight > 0]
        assert len(update) == len(set(update))
        share = [weight / count / world_size for indices, (weight,) in here if weight > 0 and indices]
        assert sum(share) == pytest.approx(1.0)
        updates.append(update)
    assert all(len(u) == min(size, pairs) for u in updates[:-1])
    assert sorted(i for u in updates for i in u) == sorted(list(range(pairs)) * passes)
    assert len(updates) == plan.updates


def test_passes_over_few_pairs_resume_in_the_middle(tmp_path: Path, llama: Path, prompts: str) -> None:
    """At most 10 pairs in updates of up to 16: each pass is one update, whether or not the run stops after two."""
    from tests.integration.test_fit import assert_same, weights

    trained = []
    for name in ("whole", "parts"):
        folder = tmp_path / name
        settings: dict[str, Any] = {"max_epochs": 1, "accumulate_grad_batches": 8, "enable_checkpointing": True}
        more: dict[str, Any] = {"data": {"passes": 4}}
        if name == "parts":
            with pytest.raises(SystemExit):
                fit(folder, llama, prompts, [RoundCheckpoint(every_n_updates=1), Stop()], **more, **settings)
            settings["ckpt_path"] = str(folder / "checkpoints" / "last.ckpt")
        trainer, module = fit(folder, llama, prompts, [RoundCheckpoint(every_n_updates=1)], **more, **settings)
        pairs = RoundStore(folder).round(0).info("pairs")["pairs"]
        assert 0 < pairs <= 10
        assert trainer.global_step == 4
        trained.append(weights(module))
    assert_same(*trained)


def test_servers_report_how_they_reshape(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server's default sampling options do not count, since requests give every option."""
    sampler = VLLMServerSampler(urls=["http://one:1"])
    engine = {"logprobs_mode": "raw_logprobs", "override_generation_config": {"repetition_penalty": 1.1}}
    monkeypatch.setattr(ServedEngine, "get_config", lambda served, backend: {"model_config": engine})
    assert sampler.reshapes() == []
    engine["logits_processors"] = ["package:Processor"]  # type: ignore[assignment]
    assert sampler.reshapes() == ["the server at http://one:1 runs with logits_processors ['package:Processor']"]
