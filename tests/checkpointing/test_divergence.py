"""A diverged run ends with an error; its weights are not saved, exported or sampled from."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_pl import (
    PairwiseLoss,
    PreferenceDataModule,
    RebelModule,
    RewardModelModule,
    SFTDataModule,
    SFTModule,
)
from rlhf_pl.__main__ import main
from rlhf_pl.callbacks import EpochRun, HFExport, RoundCheckpoint
from rlhf_pl.checkpointing.divergence import DivergedError
from rlhf_pl.models.policy import load_lm
from rlhf_pl.models.source import ModelSource
from rlhf_pl.optim import AdamW
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.finite import find_first_nonfinite
from tests.conftest import save_llama
from tests.integration.test_fit import PROMPTS, fit

ROW = {"chosen": "Yes.", "rejected": "No.", "response": "Yes.", "chosen_reward": 1.0, "rejected_reward": 0.0}
KINDS = {
    "rebel": "--data.prompts {rows} --data.max_prompt_tokens 64 --rollout.sampler TransformersSampler "
    "--rollout.sampling.num_responses 3 --rollout.sampling.max_response_tokens 4 --rollout.reward rewards.score",
    "offline": "--data OfflineDataModule --data.pairs {rows}",
    "sft": "--model SFTModule --data SFTDataModule --data.conversations {rows} --data.val_conversations 0 "
    "--data.max_tokens 64",
    "reward": "--model RewardModelModule --data PreferenceDataModule --data.preferences {rows} "
    "--data.val_preferences 0 --data.max_tokens 64",
}
COLUMNS = {
    "rebel": ("prompt",),
    "offline": ("prompt", "chosen", "rejected", "chosen_reward", "rejected_reward"),
    "sft": ("prompt", "response"),
    "reward": ("prompt", "chosen", "rejected"),
}


@pytest.fixture
def command(
    tmp_path: Path, llama: Path, write_jsonl: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[str]]:
    (tmp_path / "rewards.py").write_text(
        "def score(response):\n    return len(set(response)) / 10\n"
        "def huge(response):\n    return 1.7e308 * (-1) ** len(response)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(kind: str, *more: str) -> list[str]:
        rows = [{"prompt": f"Is {i} even?"} | ROW for i in range(8)]
        file = write_jsonl([{name: row[name] for name in COLUMNS[kind]} for row in rows], f"{kind}.jsonl")
        model = f"--model.{'backbone' if kind == 'reward' else 'policy'} {llama}"
        shared = "--data.batch_size 2 --trainer.max_epochs 1 --trainer.accelerator cpu --trainer.default_root_dir run"
        # `--model CLASS` comes before its options
        return ["fit", *KINDS[kind].format(rows=file).split(), *model.split(), *shared.split(), *more]

    return make


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_diverged_run_writes_no_model(
    command: Callable[..., list[str]], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(kind, "--model.optimizer.lr", "1e30")) == 1
    error = capsys.readouterr().err
    assert error.count("error: ") == 1
    assert "Training has diverged: at update" in error
    assert "model.optimizer.lr" in error
    assert not Path("run/model").exists()
    assert not list(Path("run").glob("checkpoints/*.ckpt"))
    if kind == "rebel":
        assert "training" not in json.loads(Path("run/rounds/0000/manifest.json").read_text())["stages"]


def test_a_single_update_with_a_huge_learning_rate_is_an_error(
    command: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Adam's first step is about the learning rate: weights of 1e6 are finite, but useless."""
    assert main(command("sft", "--model.optimizer.lr", "1e6", "--trainer.max_steps", "1")) == 1
    assert "holds numbers that are not finite, or beyond 65504" in capsys.readouterr().err
    assert not list(Path("run").rglob("*.ckpt"))


@pytest.mark.parametrize(
    "options",
    [
        ("rebel", "model.loss.eta", ".nan"),
        ("rebel", "model.optimizer.lr", ".inf"),
        ("rebel", "model.optimizer.betas", "[0.9, 1e999]"),
        ("rebel", "rollout.sampling.temperature", ".inf"),
        ("rebel", "rollout.shaping", "{length_penalty: .nan}"),
        ("rebel", "guards.min_reward_std", ".nan"),
        ("rebel", "guards.max_kl", ".nan"),
        ("sft", "trainer.gradient_clip_val", "1e999"),
        ("sft", "data.chat_template_kwargs", "{depth: [1, .nan]}"),
        ("sft", "model.lora", "{class_path: LoRA, init_args: {alpha: .inf}}"),
        ("sft", "model.lr_scheduler", "{class_path: torch.optim.lr_scheduler.ExponentialLR, init_args: {gamma: .nan}}"),
    ],
)
def test_options_are_finite(
    command: Callable[..., list[str]], options: tuple[str, str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    kind, name, value = options
    try:
        code = main(command(kind, f"--{name}", value))
    except SystemExit as stop:
        code = stop.code  # type: ignore[assignment]
    error = capsys.readouterr().err
    assert code in (1, 2)
    assert error.count("error: ") == 1
    assert name.rpartition(".")[2] in error
    assert not Path("run").exists()


def test_rewards_whose_margin_overflows_are_refused(
    command: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command("rebel", "--rollout.reward", "rewards.huge", "--rollout.scoring.retries", "0")) == 1
    error = capsys.readouterr().err
    assert "rewards.huge" in error
    assert "1.7e+308" in error
    assert "at most 1e+12" in error
    assert main(command("offline", "--model.loss.eta", "1e20")) == 1  # (1e20 * 1)^2 = 1e40 is beyond float32's 3.4e38
    error = capsys.readouterr().err
    assert "the rewards 1 (chosen) and 0 (rejected) of prompt_id 'row-" in error
    assert "8 of 8 pairs" in error
    assert not list(Path("run").rglob("*.ckpt"))


class PoisonAt(L.Callback):
    """Sets a weight to NaN in a process's optimizer step number `step`."""

    def __init__(self, step: int) -> None:
        self.remaining = step

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        def poison(*_: Any) -> None:
            self.remaining -= 1
            if self.remaining == 0:
                with torch.no_grad():
                    next(p for n, p in module.named_parameters() if n.endswith("layers.1.mlp.up_proj.weight"))[0, 0] = (
                        math.nan
                    )

        trainer.optimizers[0].register_step_post_hook(poison)


def quiet_trainer(folder: Path, callbacks: list[L.Callback], **options: Any) -> L.Trainer:
    """A Trainer of one epoch on the CPU."""
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(accelerator="cpu", max_epochs=1, default_root_dir=folder, callbacks=callbacks, **quiet, **options)


def tune(
    folder: Path,
    llama: Path,
    rows: str,
    callbacks: list[L.Callback],
    every: int = 2,
    module: Any = SFTModule,
    **options: Any,
) -> None:
    L.seed_everything(1, verbose=False)
    trainer = quiet_trainer(folder, [EpochRun(), RoundCheckpoint(every), HFExport(), *callbacks])
    trained = module(str(llama), optimizer=lambda p: AdamW(p, lr=1e-3))
    data = SFTDataModule(rows, val_conversations=0, max_tokens=64, batch_size=2)
    trainer.fit(trained, datamodule=data, **options)


@pytest.fixture
def conversations(write_jsonl: Callable[..., str]) -> str:
    return write_jsonl([{"prompt": f"Is {i} even?", "response": "Yes."} for i in range(36)])  # three in a packed row


@pytest.mark.parametrize("averaged", [False, True])
def test_weights_broken_by_the_last_update_are_not_saved(
    tmp_path: Path, llama: Path, conversations: str, averaged: bool
) -> None:
    """The loss of the sixth and last update is finite; all files are those of the fourth."""
    keep = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=1, save_weights_only=True, save_top_k=-1)
    others: list[L.Callback] = [keep, *([EMAWeightAveraging(decay=0.5)] if averaged else [])]
    with pytest.raises(DivergedError, match=r"update 6.*`policy.lm.model.layers.1.mlp.up_proj.weight`") as stopped:
        tune(tmp_path / "run", llama, conversations, [PoisonAt(6), *others])
    good = tmp_path / "run" / "checkpoints" / "update-00000004.ckpt"
    assert str(good) in str(stopped.value)
    assert [f.name for f in good.parent.glob("u*.ckpt")] == [good.name]
    for file in [good, *(tmp_path / "kept").glob("*.ckpt")]:
        state = torch.load(file, weights_only=True)["state_dict"]
        assert all(t.isfinite().all() for t in state.values())
    assert len(list((tmp_path / "kept").glob("*.ckpt"))) == 5
    assert not (tmp_path / "run" / "model").exists()
    tune(tmp_path / "run", llama, conversations, others[1:], ckpt_path=str(good))  # the run can resume from it
    assert all(t.isfinite().all() for t in load_file(tmp_path / "run/model/model.safetensors").values())


def test_diverged_weights_are_not_validated(tmp_path: Path, llama: Path, write_jsonl: Callable[..., str]) -> None:
    """A reward model's calibration error can't be computed from NaN scores."""
    rows = write_jsonl([{"prompt": f"Is {i} even?", "chosen": "Yes.", "rejected": "No."} for i in range(4)])
    trainer = quiet_trainer(tmp_path, [EpochRun(), RoundCheckpoint(), PoisonAt(1)], num_sanity_val_steps=0)
    data = PreferenceDataModule(rows, val_preferences=2, max_tokens=64, batch_size=2)
    with pytest.raises(DivergedError, match=r"`classifier.model.model.layers.1.mlp.up_proj.weight`"):
        trainer.fit(RewardModelModule(str(llama), optimizer=lambda p: AdamW(p, lr=1e-3)), datamodule=data)
    assert "val/loss" not in trainer.callback_metrics


def test_a_checkpoint_with_nan_is_neither_resumed_nor_exported(tmp_path: Path, llama: Path, conversations: str) -> None:
    tune(tmp_path, llama, conversations, [])
    folder = tmp_path / "checkpoints"
    last, other = folder / "after-round-0001.ckpt", folder / "update-00000004.ckpt"
    content = torch.load(last, weights_only=True)
    shutil.copy(last, other)
    content["state_dict"]["policy.lm.model.norm.weight"][3] = math.nan
    content["global_step"] += 1
    torch.save(content, last)
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(DivergedError, match=r"norm.weight.*resume with --ckpt_path .*update-00000004.ckpt"):
        tune(tmp_path, llama, conversations, [], ckpt_path=str(last))
    assert not (tmp_path / "model").exists()


class DivergingLoss(PairwiseLoss):
    """Finite before call number `at`, then with an infinite `loss` or `gradient`."""

    def __init__(self, part: str, at: int = 1) -> None:
        self.part, self.at = part, at
        self.calls = 0

    def __call__(self, chosen: Tensor, rejected: Tensor, margins: Tensor) -> Tensor:
        losses = (chosen - rejected - margins) ** 2
        if not losses.requires_grad:  # in the check before the round
            return losses
        self.calls += 1
        if self.calls == self.at and self.part == "loss":
            losses = losses + math.inf  # its gradient is finite, so the weights are too
        if self.calls >= self.at and self.part == "gradient":
            losses = losses + (chosen - chosen.detach()).sqrt()  # 0 + sqrt(0)
        return losses


@pytest.mark.parametrize("at", [1, 4, 5])
def test_the_loss_of_every_micro_batch_is_checked(
    tmp_path: Path, llama: Path, write_jsonl: Callable[..., str], at: int
) -> None:
    """Two micro-batches per update: the first one, the last of update 2, and one of the round's last update."""
    with pytest.raises(DivergedError, match=rf"at update {(at + 1) // 2}, .*the loss is not finite"):
        fit(tmp_path, llama, write_jsonl(PROMPTS), [HFExport(), RoundCheckpoint()], {"loss": DivergingLoss("loss", at)},
            {"val_prompts": 0, "prompts_per_round": 10}, enable_checkpointing=True, max_epochs=1)  # fmt: skip
    assert not list(tmp_path.rglob("*.ckpt"))
    assert not (tmp_path / "model").exists()


def test_the_norm_of_clipping_is_checked(tmp_path: Path, llama: Path, write_jsonl: Callable[..., str]) -> None:
    with pytest.raises(DivergedError, match=r"at update 1, .*the norm of the gradients is not finite"):
        fit(tmp_path, llama, write_jsonl(PROMPTS), None, {"loss": DivergingLoss("gradient")},
            {"val_prompts": 0}, max_epochs=1, gradient_clip_val=1.0)  # fmt: skip


@pytest.mark.parametrize("scale", [2.0**16, 2.0**-125])
def test_a_scaler_may_skip_infinite_gradients_but_not_all(
    tmp_path: Path, llama: Path, write_jsonl: Callable[..., str], scale: float
) -> None:
    """In the first case only update 3 overflows; in the second all do, and the scale falls below 2^-126."""
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))
    settings: dict[str, Any] = {"data": {"val_prompts": 0}, "max_epochs": 1, "plugins": [plugin]}
    if scale < 1:
        with pytest.raises(DivergedError, match="gradients are not finite at any scale"):
            fit(tmp_path, llama, write_jsonl(PROMPTS), None, {"loss": DivergingLoss("gradient")}, **settings)
        return
    _, module = fit(tmp_path, llama, write_jsonl(PROMPTS), None, {"loss": DivergingLoss("gradient", 7)}, **settings)
    assert module.optimization.skipped.in_run > 0


def test_a_diverged_policy_is_reported_before_the_sampler_is_checked(
    tmp_path: Path, llama: Path, write_jsonl: Callable[..., str]
) -> None:
    """Weights of 6e4 are finite and give infinite activations; the next round's sampler never sees them."""

    class Swell(L.Callback):
        def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            def swell(*_: Any) -> None:
                with torch.no_grad():
                    for name, parameter in module.named_parameters():
                        if "norm" in name or "embed" in name:
                            parameter.fill_(6e4)

            trainer.optimizers[0].register_step_post_hook(swell)

    with pytest.raises(DivergedError, match="the log-probs of the policy are not finite"):
        fit(tmp_path, llama, write_jsonl(PROMPTS), [Swell(), HFExport()], {"dtype": "float16"},
            {"val_prompts": 0, "prompts_per_round": 4}, max_epochs=2)  # fmt: skip
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_with_nan_is_refused(tmp_path: Path, dtype: str) -> None:
    folder = save_llama(tmp_path / "damaged")
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.self_attn.q_proj.weight"][1, 2] = math.nan
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"damaged.*layers.1.self_attn.q_proj.weight' in model.safetensors"):
        load_lm(ModelSource(str(folder)), dtype)  # type: ignore[arg-type]
    module = RewardModelModule(str(folder))
    with pytest.raises(InputError, match=r"`model.backbone`.*not finite"):
        module.configure_model()


def test_weights_beyond_the_exports_dtype_are_refused(tmp_path: Path, llama: Path) -> None:
    module = RebelModule(str(llama))
    module.configure_model()
    assert module.policy is not None
    with torch.no_grad():
        module.policy.lm.model.norm.weight[0] = 7e4
    with pytest.raises(InputError, match=r"`model.norm.weight`.*float16"):
        module.export(str(tmp_path / "half"), "float16")
    assert not list(tmp_path.rglob("*.safetensors"))
    module.export(str(tmp_path / "whole"), "float32")


def test_the_first_nonfinite_tensor_is_found() -> None:
    good = [("i", torch.tensor([2**40])), ("none", torch.zeros(0)), ("b", torch.ones(3, dtype=torch.bfloat16))]
    assert find_first_nonfinite(good) == ""
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn):
        for wrong in (math.nan, math.inf, -math.inf):
            if dtype != torch.float8_e4m3fn or math.isnan(wrong):
                tensor = torch.tensor([0.0, wrong, 1.0]).to(dtype)
                assert find_first_nonfinite([*good, ("x", tensor), ("y", tensor)]) == "x"
    assert find_first_nonfinite([("x", torch.tensor([-3.0, 1.0]))], largest=2.0) == "x"


def test_initial_values_of_a_model_have_not_diverged(tmp_path: Path, llama: Path, conversations: str) -> None:
    """Weights beyond float16's range, and buffers with infinity or NaN for unknown values."""

    class Large(SFTModule):
        def configure_model(self) -> None:
            first = self.policy is None
            super().configure_model()
            if first:
                self.table = torch.nn.Parameter(torch.full((3,), 1e6))
                self.register_buffer("best", torch.full((3,), math.inf))
                self.register_buffer("unknown", torch.tensor(math.nan))

        def export(self, folder: str, dtype: str | None = None) -> None:
            del self.table
            super().export(folder, dtype)

    tune(tmp_path, llama, conversations, [], module=Large)
    assert (tmp_path / "model").exists()


def test_a_run_without_an_update_reports_it(
    tmp_path: Path, llama: Path, write_jsonl: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    fit(tmp_path, llama, write_jsonl(PROMPTS), None, {"loss": DivergingLoss("gradient")},
        {"val_prompts": 0}, max_epochs=1, plugins=[plugin])  # fmt: skip
    assert "No update was made" in " ".join(capsys.readouterr().out.split())
