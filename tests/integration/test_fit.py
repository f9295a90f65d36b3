"""Complete runs of a real Trainer on a small random model, with the transformers sampler."""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from rlhf_pl import RebelLoss, RebelModule, RoundDataModule, SamplingConfig, TransformersSampler
from rlhf_pl.callbacks import DegenerationGuard, HFExport, RoundRefresh, SampleTable
from rlhf_pl.optim import AdamW
from rlhf_pl.rollout import EngineSpec
from rlhf_pl.rollout.base import NamedTensors
from rlhf_pl.rollout.weight_sync.self_check import StaleSamplerError
from rlhf_pl.store.round_store import RoundStore
from rlhf_pl.utils.errors import InputError
from tests.conftest import save_llama
from tests.stored_pairs import read_pairs

PROMPTS = [{"prompt_id": f"p{i}", "prompt": f"What is {i} plus {i + 1}?", "answer": 2 * i + 1} for i in range(14)]


def reward(response: str, answer: int) -> float:
    """A reward that differs between responses and reads a column."""
    return len(set(response)) / 10 + answer / 1000


class Recorder(L.Callback):
    """Records the log-ratios of every round's first batch before its update, and every update's loss and rate."""

    def __init__(self) -> None:
        self.first_logratios: list[float] = []
        self.losses: list[float] = []
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            packed = batch.rows
            with torch.no_grad():
                logps = packed.sum_per_response(module(**packed.inputs(), temperature=batch.temperature))
            self.first_logratios.append((logps - batch.stored["old_logps"]).abs().max().item())

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: Any) -> None:
        if trainer.global_step > len(self.losses):
            self.losses.append(float(trainer.callback_metrics["train/loss"]))
            self.rates.append(float(trainer.callback_metrics["train/lr"]))


def fit(
    folder: Path,
    llama: Path,
    prompts: str,
    callbacks: list[L.Callback] | None = None,
    module: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    refresh: dict[str, Any] | None = None,
    ckpt_path: str | None = None,
    attributes: dict[str, Any] | None = None,
    **trainer: Any,
) -> tuple[L.Trainer, RebelModule]:
    L.seed_everything(5, verbose=False)
    settings = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "accumulate_grad_batches": 2,
        "logger": CSVLogger(folder, name="csv", version=""),
        "log_every_n_steps": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
    } | trainer
    rounds = RoundRefresh(
        **{
            "reward": "tests.integration.test_fit.reward",
            "sampler": TransformersSampler(),
            "sampling": SamplingConfig(num_responses=3, max_response_tokens=8, temperature=0.9),
            "val_num_responses": 2,
            "prompts_per_shard": 3,
        }
        | (refresh or {})
    )
    for name, value in (attributes or {}).items():
        setattr(rounds, name, value)
    run = L.Trainer(
        devices=1,
        default_root_dir=folder,
        enable_model_summary=False,
        callbacks=[rounds, *(callbacks or [])],
        **settings,
    )
    rebel = RebelModule(
        str(llama), **{"loss": RebelLoss(2.0), "optimizer": lambda p: AdamW(p, lr=1e-3)} | (module or {})
    )
    run.fit(
        rebel,
        datamodule=RoundDataModule(
            prompts, **{"val_prompts": 4, "batch_size": 2, "max_prompt_tokens": 64} | (data or {})
        ),
        ckpt_path=ckpt_path,
    )
    return run, rebel


@pytest.fixture
def prompts(write_jsonl: Callable[..., str]) -> str:
    return write_jsonl(PROMPTS)


def weights(module: RebelModule) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.weights().stream()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_run_trains_logs_and_exports(tmp_path: Path, llama: Path, prompts: str) -> None:
    recorder = Recorder()
    _, module = fit(tmp_path, llama, prompts, [recorder, SampleTable(2), HFExport(dtype="float32")])
    # before a round's first update the policy is pi_old
    assert len(recorder.first_logratios) == 2
    assert max(recorder.first_logratios) < 1e-4
    store = RoundStore(tmp_path)
    pairs = store.round(0).read("pairs").to_pylist()
    assert all(p["chosen_reward"] > p["rejected_reward"] for p in pairs)
    columns = set((tmp_path / "csv" / "metrics.csv").read_text().splitlines()[0].split(","))
    assert {
        "train/loss", "train/kl", "train/kl_chosen", "train/ratio_mean", "train/sign_align", "train/lr",
        "rollout/reward_mean", "rollout/reward_best", "rollout/response_tokens", "rollout/finished_share",
        "rollout/sampler_logp_error", "val/reward_mean", "val/win_rate", "val/loss", "val/sign_align",
        "time/generate_s", "time/sync_s",
    } <= columns  # fmt: skip
    assert "after round 2" in (tmp_path / "samples.html").read_text()
    # plain transformers loads the export: same weights, same EOS ids, a chat template
    from transformers import AutoModelForCausalLM, AutoTokenizer

    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert_same(weights(module), dict(exported.state_dict()))
    assert exported.generation_config.eos_token_id == [1, 2]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False).startswith(
        "<s><|user|>Hi"
    )
    for stage in ("responses", "rewards", "pairs", "logps"):
        assert pq.read_table(tmp_path / "rounds" / "0001" / stage).num_rows > 0


def test_first_loss_equals_eta_squared_times_margins(tmp_path: Path, llama: Path, prompts: str) -> None:
    recorder = Recorder()
    fit(tmp_path, llama, prompts, [recorder], data={"batch_size": 100}, max_epochs=1, accumulate_grad_batches=1)
    pairs = RoundStore(tmp_path).round(0).read("pairs").to_pylist()
    expected = sum((2.0 * (p["chosen_reward"] - p["rejected_reward"])) ** 2 for p in pairs) / len(pairs)
    assert recorder.losses == [pytest.approx(expected, rel=1e-4)]


def test_same_seed_gives_the_same_rounds_and_weights(tmp_path: Path, llama: Path, prompts: str) -> None:
    runs = [weights(fit(tmp_path / name, llama, prompts)[1]) for name in ("a", "b")]
    assert_same(*runs)
    for stage in ("rounds/0000/responses", "rounds/0001/responses", "rounds/0001/logps", "heldout/0002/responses"):
        one, other = (sorted(file.name for file in (tmp_path / name / stage).iterdir()) for name in ("a", "b"))
        assert one
        assert one == other, stage  # the names have the checksums


def test_accumulation_equals_one_large_batch(tmp_path: Path, llama: Path, prompts: str) -> None:
    """10 pairs: 2 x 2 against 1 x 4 pairs per update, the last update with 2 pairs; also divided by tokens."""
    start = weights(_load_module(llama))
    ends, during = [], []
    recorder = LambdaCallback(on_train_start=lambda trainer, _: during.append(trainer.accumulate_grad_batches))
    for name, batch, accumulate, tokens in (
        ("small", 2, 2, None),
        ("large", 4, 1, None),
        ("odd", 1, 4, None),
        ("budget", 4, 1, 90),
    ):
        trainer, module = fit(
            tmp_path / name,
            llama,
            prompts,
            [recorder],
            module={"optimizer": lambda p: torch.optim.SGD(p, lr=1e-3)},
            data={"batch_size": batch, "max_tokens_per_batch": tokens},
            accumulate_grad_batches=accumulate,
            max_epochs=1,
        )
        ends.append(weights(module))
        assert trainer.global_step == 3
        assert trainer.accumulate_grad_batches == accumulate  # restored after the fit
    assert during[:3] == [2, 1, 4]
    assert during[3] > 1
    for other in ends[1:]:
        for key, value in ends[0].items():
            torch.testing.assert_close(other[key], value, atol=2e-6, rtol=1e-4)
    assert max((ends[0][k] - start[k]).abs().max().item() for k in start) > 1e-4


def _load_module(llama: Path) -> RebelModule:
    module = RebelModule(str(llama))
    module.configure_model()
    return module


def test_gradient_checkpointing_changes_nothing(tmp_path: Path, llama: Path, prompts: str) -> None:
    plain = weights(fit(tmp_path / "a", llama, prompts, max_epochs=1)[1])
    saving = weights(fit(tmp_path / "b", llama, prompts, module={"gradient_checkpointing": True}, max_epochs=1)[1])
    for name in plain:
        torch.testing.assert_close(saving[name], plain[name], atol=1e-5, rtol=1e-4)


def test_eos_is_part_of_the_response_and_its_logp(tmp_path: Path, llama: Path, prompts: str) -> None:
    sampling = SamplingConfig(num_responses=6, max_response_tokens=40, temperature=0.9)
    fit(tmp_path, llama, prompts, refresh={"sampling": sampling}, max_epochs=1)
    stored = RoundStore(tmp_path).round(0)
    rows = stored.read("responses").to_pylist()
    finished = [r for r in rows if r["finished"]]
    truncated = [r for r in rows if not r["finished"]]
    assert finished
    assert truncated
    assert all(r["response_tokens"][-1] in (1, 2) for r in finished)
    assert all(not {1, 2} & set(r["response_tokens"]) and len(r["response_tokens"]) == 40 for r in truncated)
    start = _load_module(llama)
    for pair in read_pairs(stored):
        ids = torch.tensor([pair["prompt_tokens"] + pair["chosen_tokens"]])
        assert start.policy is not None
        with torch.no_grad():
            logps = (start.policy.lm(input_ids=ids).logits[0].double() / 0.9).log_softmax(-1)
        first = len(pair["prompt_tokens"])
        expected = sum(logps[t - 1, ids[0, t]].item() for t in range(first, ids.shape[1]))
        assert pair["chosen_old_logp"] == pytest.approx(expected, abs=1e-4)


def test_kl_penalty_enters_the_margins(tmp_path: Path, llama: Path, prompts: str) -> None:
    """In round 2 the policy differs from the reference, and the loss at log-ratio 0 uses the penalized rewards."""
    recorder = Recorder()
    fit(
        tmp_path,
        llama,
        prompts,
        [recorder],
        module={"kl_coef": 0.5},
        data={"batch_size": 100},
        accumulate_grad_batches=1,
    )
    for index, loss in enumerate(recorder.losses):
        stored = RoundStore(tmp_path).round(index)
        expected = 0.0
        pairs = read_pairs(stored)
        for pair in pairs:
            margin = 0.0
            for which, sign in (("chosen", 1.0), ("rejected", -1.0)):
                penalty = 0.5 * (pair[f"{which}_old_logp"] - pair[f"{which}_reference_logp"])
                margin += sign * (pair[f"{which}_reward"] - penalty)
            expected += (2.0 * margin) ** 2 / len(pairs)
        assert loss == pytest.approx(expected, rel=1e-3)
        moved = max(abs(r["chosen_old_logp"] - r["chosen_reference_logp"]) for r in pairs)
        assert moved < 1e-4 if index == 0 else moved > 1e-3


def test_the_samplers_own_logps_can_be_used(tmp_path: Path, llama: Path, prompts: str) -> None:
    """The same rounds and weights as with a forward pass, up to rounding; the difference is reported."""
    sampling = SamplingConfig(num_responses=3, max_response_tokens=8)
    for origin in ("policy", "sampler"):
        refresh = {"sampling": sampling, "old_logps": origin}
        fit(tmp_path / origin, llama, prompts, module={"kl_coef": 0.1}, refresh=refresh)
    policy, sampler = (RoundStore(tmp_path / origin).round(1) for origin in ("policy", "sampler"))
    for name in policy.read("logps").column_names[2:]:
        found, expected = (r.read("logps")[name].to_pylist() for r in (sampler, policy))
        assert found == pytest.approx(expected, abs=1e-3)
    assert 0 < sampler.info("logps")["sampler_difference"] < 1e-4
    assert "sampler_difference" not in policy.info("logps")
    with pytest.raises(InputError, match="samplers report log-probs at temperature 1"):
        RoundRefresh(reward, sampling=SamplingConfig(temperature=0.5), old_logps="sampler")


def test_learning_rate_warms_up_and_falls_over_the_run(tmp_path: Path, llama: Path, prompts: str) -> None:
    """3 updates per round, 2 rounds: the rates at the middles of 6 slices, warm-up over the first tenth."""
    recorder = Recorder()
    fit(tmp_path, llama, prompts, [recorder])
    updates = [(k + 0.5) / 6 for k in range(6)]
    expected = [1e-3 * (p / 0.1 if p < 0.1 else 0.5 * (1 + math.cos(math.pi * (p - 0.1) / 0.9))) for p in updates]
    assert recorder.rates == pytest.approx(expected)


@pytest.mark.parametrize("tokens", [None, 90])
def test_a_run_resumes_from_a_checkpoint_inside_a_round(
    tmp_path: Path, llama: Path, prompts: str, tokens: int | None
) -> None:
    """Stopped after 2 of 6 updates and started again: the same batches, rates and weights as without the stop."""

    class Stop(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == 2:
                raise KeyboardInterrupt

    def checkpoints() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / "b" / "checkpoints", every_n_train_steps=1, save_last=True)

    options: dict[str, Any] = {"data": {"max_tokens_per_batch": tokens}}
    _, whole = fit(tmp_path / "a", llama, prompts, **options)
    options["enable_checkpointing"] = True
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        fit(tmp_path / "b", llama, prompts, [Stop(), checkpoints()], **options)
    _, resumed = fit(tmp_path / "b", llama, prompts, [checkpoints()], ckpt_path="last", **options)
    assert_same(weights(whole), weights(resumed))


def test_rounds_prepared_with_other_settings_are_refused(tmp_path: Path, llama: Path, prompts: str) -> None:
    fit(tmp_path, llama, prompts, max_epochs=1)
    with pytest.raises(InputError, match="other settings") as error:
        fit(tmp_path, llama, prompts, refresh={"sampling": SamplingConfig(3, 0.5, max_response_tokens=8)})
    assert "temperature" in str(error.value)


def test_changed_settings_are_refused_on_resume(tmp_path: Path, llama: Path, prompts: str) -> None:
    """Round 2 is complete on disk, the checkpoint is from the end of round 1, and the seed of the run has changed."""

    class Stop(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == 4:
                raise KeyboardInterrupt

    def checkpoints() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / "checkpoints", save_last=True, save_on_train_epoch_end=True)

    with pytest.raises((SystemExit, KeyboardInterrupt)):
        fit(tmp_path, llama, prompts, [Stop(), checkpoints()], enable_checkpointing=True)
    again = {"enable_checkpointing": True, "ckpt_path": "last"}
    with pytest.raises(InputError, match="seed: 5 -> 6"):
        fit(tmp_path, llama, prompts, [checkpoints()], data={"seed": 6}, **again)
    _, resumed = fit(tmp_path, llama, prompts, [checkpoints()], **again)
    _, whole = fit(tmp_path / "whole", llama, prompts)
    assert_same(weights(whole), weights(resumed))


class StaleSampler(TransformersSampler):
    """Ignores the second weight sync."""

    def start(self, spec: EngineSpec) -> None:
        super().start(spec)
        self.loads = 0

    def load_weights(self, tensors: NamedTensors) -> None:
        self.loads += 1
        if self.loads == 1:
            super().load_weights(tensors)


def test_stale_sampler_stops_the_run(tmp_path: Path, llama: Path, prompts: str) -> None:
    with pytest.raises(StaleSamplerError):
        fit(
            tmp_path,
            llama,
            prompts,
            refresh={"sampler": StaleSampler()},
            module={"optimizer": lambda p: AdamW(p, lr=0.05)},
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": {"max_prompt_tokens": 250}}, "is over the context"),
        ({"data": {"max_prompt_tokens": 3}}, "no row of .* is left"),
        ({"data": {"val_prompts": 14}}, "all 14 are held out"),
        ({"refresh": {"reward": "tests.integration.test_fit.nothing"}}, "has no 'nothing'"),
        ({"refresh": {"reward": lambda response: float("nan")}}, "nan"),
        ({"refresh": {"reward": None}}, "holds no prepared rounds"),
        ({"refresh": {"sampling": SamplingConfig(num_responses=1)}}, "2 or more"),
        ({"module": {"kl_coef": -1.0}}, "kl_coef"),
        ({"module": {"reference": "somewhere"}}, "would have no effect"),
        ({"data": {"batch_size": 0}}, "batch_size"),
        ({"precision": "bf16-true"}, "32-true"),
    ],
)
def test_user_errors_are_refused_before_the_model_loads(
    tmp_path: Path, llama: Path, prompts: str, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], message: str
) -> None:
    def fail(self: RebelModule) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(RebelModule, "configure_model", fail)
    with pytest.raises(InputError, match=message):
        fit(tmp_path / "run", llama, prompts, **{"logger": False} | settings)
    assert not (tmp_path / "run").exists()


def test_nan_reward_in_the_middle_names_its_prompt(tmp_path: Path, llama: Path, prompts: str) -> None:
    def sometimes(response: str, prompt_id: str) -> float:
        return (
            float("nan") if prompt_id == "p7" and response not in ("", "word " * 40) and "Yes" not in response else 0.5
        )

    with pytest.raises(InputError, match="p7"):
        fit(tmp_path, llama, prompts, refresh={"reward": sometimes}, data={"val_prompts": 0})


def test_a_round_without_usable_pairs_is_skipped_with_a_warning(
    tmp_path: Path, llama: Path, prompts: str, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    """Round 1 has equal rewards for all responses; round 2 trains."""
    calls: list[str] = []

    def constant_at_first(response: str, prompt_id: str) -> float:
        calls.append(prompt_id)
        return 1.0 if len(calls) <= 6 + 15 else float(len(set(response)))  # after the trial and the first round

    data = {"prompts_per_round": 5, "val_prompts": 0}
    recorder = Recorder()
    _, module = fit(
        tmp_path,
        llama,
        prompts,
        [DegenerationGuard(), recorder],
        refresh={"reward": constant_at_first},
        data=data,
        max_epochs=2,
    )
    assert "round 1: 0 of 5 prompts give a usable pair (5 with no reward difference)" in " ".join(
        capsys.readouterr().out.split()
    )
    assert not [w for w in recwarn if "lr_scheduler.step" in str(w.message)]
    store = RoundStore(tmp_path)
    assert set(store.round(0).manifest["warnings"]) == {"pairs", "reward_std"}
    assert store.round(0).info("training")["loss"] is None
    assert store.round(1).info("training")["loss"] > 0
    before, after = (store.round(i).manifest["settings"]["responses"] for i in (0, 1))
    assert (before["policy_step"], before["weights"]) == (after["policy_step"], after["weights"])
    assert len(recorder.losses) > 0
    start, end = weights(_load_module(llama)), weights(module)
    assert any(not torch.equal(start[name], end[name]) for name in start)


def test_other_model_sizes_and_system_prompts(tmp_path: Path, write_jsonl: Callable[..., str]) -> None:
    llama = save_llama(tmp_path / "other", seed=3, tie_word_embeddings=False, num_hidden_layers=1)
    prompts = write_jsonl([{"q": [{"role": "user", "content": f"Say {i}"}]} for i in range(6)])
    fit(
        tmp_path / "run",
        llama,
        prompts,
        data={"columns": {"prompt": "q"}, "system_prompt": "Be brief.", "val_prompts": 2},
        refresh={"reward": lambda response: len(response), "val_num_responses": 1, "val_temperature": 0.0},
        max_epochs=1,
    )
    row = RoundStore(tmp_path / "run").round(0).read("responses").to_pylist()[0]
    assert json.loads(row["prompt"])[0] == {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("precision", "data"),
    [
        ("32-true", {"batch_size": 2}),
        ("bf16-mixed", {"batch_size": 3, "passes": 2}),
        ("bf16-mixed", {"max_tokens_per_batch": 60}),
    ],
)
def test_log_ratios_before_the_first_update_are_zero(
    tmp_path: Path, llama: Path, prompts: str, precision: str, data: dict[str, Any]
) -> None:
    """The log-prob pass and training compute the same log-probs, to the last digit, in every round."""
    fit(tmp_path, llama, prompts, data=data, module={"kl_coef": 0.1}, precision=precision)
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        first = [row["train/first_logratio"] for row in csv.DictReader(file)]
    assert [value for value in first if value] == ["0.0", "0.0"]
    logps = RoundStore(tmp_path).round(0).read("logps")
    assert logps["old_logp"].to_pylist() == logps["reference_logp"].to_pylist()


@pytest.mark.parametrize(
    "clip", [{"gradient_clip_val": 0.5}, {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}]
)
def test_gradients_are_clipped_in_mixed_precision_with_a_fused_optimizer(
    tmp_path: Path, llama: Path, prompts: str, clip: dict[str, Any]
) -> None:
    """SGD with rate 1 moves the weights by the clipped gradient."""

    class MoveRecorder(L.Callback):
        moved: list[torch.Tensor]

        def on_train_batch_start(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
            self.before = [p.detach().clone() for p in module.parameters()]

        def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
            if trainer.global_step == 1 and not hasattr(self, "moved"):
                self.moved = [p.detach() - b for p, b in zip(module.parameters(), self.before, strict=True)]
                self.fused = trainer.optimizers[0].defaults["fused"]

    recorder = MoveRecorder()
    module = {
        "optimizer": lambda p: torch.optim.SGD(list(p), lr=1.0, fused=True),
        "lr_scheduler": make_constant_schedule,
    }
    fit(tmp_path, llama, prompts, callbacks=[recorder], module=module, precision="bf16-mixed", max_steps=1, **clip)
    assert recorder.fused
    moved = torch.cat([m.flatten() for m in recorder.moved])
    size = moved.abs().max() if "gradient_clip_algorithm" in clip else moved.norm()
    assert size.item() == pytest.approx(clip["gradient_clip_val"], rel=1e-3)


def make_constant_schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)


def test_float16_weights_in_bf16_mixed_are_refused(tmp_path: Path, llama: Path, prompts: str) -> None:
    with pytest.raises(InputError, match=r"`model\.dtype` is float16.*bf16-mixed"):
        fit(tmp_path, llama, prompts, module={"dtype": "float16"}, precision="bf16-mixed")


def test_averaged_weights_do_not_remain_in_the_copies(tmp_path: Path, llama: Path, prompts: str) -> None:
    """They replace the weights for validation without torch noticing, and are replaced again."""
    from lightning.pytorch.callbacks import EMAWeightAveraging

    recorder = Recorder()
    callbacks = [EMAWeightAveraging(decay=0.5), recorder]
    fit(tmp_path, llama, prompts, callbacks=callbacks, precision="bf16-mixed", max_epochs=3)
    assert recorder.first_logratios == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(("val", "held_out"), [(0.2, 3), (3, 3), (3.0, 3)])
def test_held_out_prompts_are_a_number_or_a_share(
    tmp_path: Path, llama: Path, prompts: str, val: float, held_out: int
) -> None:
    trainer, _ = fit(tmp_path, llama, prompts, data={"val_prompts": val}, max_epochs=1)
    assert len(trainer.datamodule.val_prompts) == held_out
    with pytest.raises(InputError, match=r"`data\.val_prompts` must be a share below 1 or a whole number, got 2\.5"):
        RoundDataModule(prompts, val_prompts=2.5)
