"""Tests that need a GPU. Run them with `make test-gpu`; without a GPU they are skipped."""

import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from rlhf_pl import FSDP2Strategy, LoRA, RebelModule
from rlhf_pl.callbacks import RoundCheckpoint
from rlhf_pl.models.compute import Compute
from rlhf_pl.models.gpu_head import gpu_logps
from rlhf_pl.models.kernel_check import is_as_exact, small_copies
from rlhf_pl.models.liger import _bind, _states_and_gradient
from rlhf_pl.models.packed_batch import PackedBatch, PrefixGroup, pack
from rlhf_pl.models.packed_layout import Layout
from rlhf_pl.models.policy import PolicyLM, load_lm
from rlhf_pl.models.shared_prefix_attention import FAST, _attention
from rlhf_pl.models.source import ModelSource
from rlhf_pl.rollout import VLLMSampler
from rlhf_pl.store.round_store import RoundStore
from tests.conftest import save_llama
from tests.integration.test_fit import PROMPTS, fit
from tests.models.test_kernels import HEADS, LENGTHS, by_mask, check_head, states

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.xdist_group("gpu"),
]
CUDA = torch.device("cuda", 0)
GROUPS = [
    PrefixGroup([5, 6, 7, 8] * 9, ([9, 10, 11] * 5, [30, 31, 32, 33, 34, 35])),
    PrefixGroup([5], ([12], [13, 14])),
    PrefixGroup([20, 21, 22], ([23, 24, 25, 26, 27], [28])),
]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with heads of 64, which all kernels support."""
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 512}
    return save_llama(tmp_path_factory.mktemp("models") / "wide", initializer_range=0.05, **sizes)


@pytest.fixture
def prompts(write_jsonl: Callable[..., str]) -> str:
    return write_jsonl(PROMPTS)


def fit_on_gpu(folder: Path, llama: Path, prompts: str, **options: Any) -> tuple[L.Trainer, RebelModule]:
    return fit(folder, llama, prompts, accelerator="gpu", use_distributed_sampler=False, **options)


def test_head_is_as_exact_as_float64_allows() -> None:
    check_head(gpu_logps, "cuda")


@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_of_prefix_groups(
    size: int, window: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(HEADS, "size", size)
    inputs = [t.detach().cuda().requires_grad_() for t in states(dtype)]
    found, _ = _attention(None, *inputs, None, fast=True, layout=Layout(LENGTHS).to("cuda"), sliding_window=window)
    exact = by_mask(*[t.cpu() for t in inputs], window, None, None)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    factors = torch.randn(found.shape)
    ours = torch.autograd.grad((found.cpu() * factors).sum(), inputs)
    theirs = torch.autograd.grad((exact * factors).sum(), inputs)
    for a, b in ((found, exact), *zip(ours, theirs, strict=True)):
        assert (a.double().cpu() - b.double().cpu()).norm() <= tolerance * b.double().norm().cpu()


@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="no liger-kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_liger_is_as_exact_as_plain_layers(wide: Path, dtype: torch.dtype) -> None:
    copies = small_copies(ModelSource(str(wide)).config, Compute(CUDA), dtype)
    exact, plain = (_states_and_gradient(copies, model) for model in (copies.exact, copies.plain))
    _bind(copies.plain)
    found = _states_and_gradient(copies, copies.plain)
    assert all(is_as_exact(*parts) for parts in zip(found, plain, exact, strict=True))


def run_update(folder: Path, device: torch.device, compute: Compute, dtype: str = "float32") -> dict[str, Tensor]:
    """Run one update; returns its loss, gradients and weights."""
    lm = load_lm(ModelSource(str(folder)), dtype, compute=compute).to(device)
    policy = PolicyLM(lm, 16, compute)
    packed: PackedBatch = pack(GROUPS).to(device)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1e-3)
    loss = packed.sum_per_response(policy(**packed.inputs(), temperature=0.9)).mul(0.01).sub(0.5).square().mean()
    loss.backward()
    found = {"loss": loss.detach().cpu()}
    found |= {f"gradient of {n}": p.grad.float().cpu() for n, p in policy.named_parameters()}
    optimizer.step()
    return found | {f"weight {n}": p.detach().float().cpu() for n, p in policy.named_parameters()}


def test_an_update_in_float32_equals_the_cpus(wide: Path) -> None:
    ours, cpu = run_update(wide, CUDA, Compute(CUDA)), run_update(wide, torch.device("cpu"), Compute())
    for name, value in ours.items():
        assert (value - cpu[name]).norm() <= 1e-4 * cpu[name].norm() + 1e-7, name


def test_an_update_in_mixed_precision_is_within_bfloat16s_error(wide: Path) -> None:
    """At most twice the distance from float32 that a CPU has in the same precision."""
    exact = run_update(wide, torch.device("cpu"), Compute())
    plain = run_update(wide, torch.device("cpu"), Compute(dtype=torch.bfloat16))
    ours = run_update(wide, CUDA, Compute(CUDA, torch.bfloat16))
    for name, value in exact.items():
        assert (ours[name] - value).norm() <= 2 * (plain[name] - value).norm() + 0.02 * value.norm(), name


def test_the_fast_attention_is_used(wide: Path) -> None:
    lm = load_lm(ModelSource(str(wide)), "bfloat16", compute=Compute(CUDA))
    assert lm.config._attn_implementation == FAST


def test_a_step_does_not_wait_for_the_device(wide: Path) -> None:
    compute = Compute(CUDA, torch.bfloat16)
    policy = PolicyLM(load_lm(ModelSource(str(wide)), compute=compute).cuda(), 16, compute)
    for trial in range(2):
        packed = pack(GROUPS).to(CUDA)
        torch.cuda.set_sync_debug_mode("warn" if trial else "default")
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            packed.sum_per_response(policy(**packed.inputs())).square().mean().backward()
        torch.cuda.set_sync_debug_mode("default")
    assert [str(w.message) for w in waits] == []


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("strategy", ["auto", "fsdp", "fsdp2"])
def test_rounds_under_every_strategy(tmp_path: Path, wide: Path, prompts: str, precision: str, strategy: str) -> None:
    given = FSDP2Strategy() if strategy == "fsdp2" else strategy
    trainer, module = fit_on_gpu(tmp_path, wide, prompts, precision=precision, strategy=given)
    assert trainer.global_step > 0
    assert all(p.isfinite().all() for _, p in module.weights().stream())


def test_log_ratios_before_the_first_update_are_zero(tmp_path: Path, wide: Path, prompts: str) -> None:
    seen: list[float] = []

    class LogRatioRecorder(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
            if "train/first_logratio" in trainer.callback_metrics and trainer.global_step == 1:
                seen.append(float(trainer.callback_metrics["train/first_logratio"]))

    fit_on_gpu(tmp_path, wide, prompts, precision="bf16-mixed", callbacks=[LogRatioRecorder()], max_epochs=1)
    assert seen[0] == 0.0


@pytest.mark.parametrize("lora", [LoRA(rank=4), LoRA(rank=4, base_dtype="nf4")], ids=["lora", "qlora"])
def test_adapters(tmp_path: Path, wide: Path, prompts: str, lora: LoRA) -> None:
    if lora.base_dtype is not None:
        pytest.importorskip("bitsandbytes")
    trainer, _ = fit_on_gpu(tmp_path, wide, prompts, precision="bf16-mixed", module={"lora": lora})
    assert trainer.global_step > 0


def test_deterministic_runs_give_the_same_weights(tmp_path: Path, wide: Path, prompts: str) -> None:
    """Without this, flash attention sums gradients in a varying order."""
    environment = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    assert environment
    options: dict[str, Any] = {"precision": "bf16-mixed", "deterministic": True, "enable_checkpointing": True}
    found = []
    for name in ("a", "b"):
        saved = RoundCheckpoint(every_n_updates=2)
        _, module = fit_on_gpu(tmp_path / name, wide, prompts, callbacks=[saved], **options)
        found.append({n: p.cpu() for n, p in module.weights().stream()})
    torch.use_deterministic_algorithms(False)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="no vLLM")
def test_vllm_sleeps_and_wakes_over_two_rounds(tmp_path: Path, wide: Path, prompts: str) -> None:
    refresh = {"sampler": VLLMSampler(gpu_memory_utilization=0.2, engine_args={"enforce_eager": True})}
    fit_on_gpu(tmp_path, wide, prompts, precision="bf16-mixed", refresh=refresh)
    store = RoundStore(tmp_path)
    assert [store.round(i).is_complete("training") for i in (0, 1)] == [True, True]


def test_a_killed_run_resumes(tmp_path: Path, wide: Path, prompts: str) -> None:
    command = [
        *(sys.executable, "-m", "rlhf_pl", "fit", "--model.policy", str(wide), "--data.prompts", prompts),
        *("--rollout.reward", "tests.integration.test_fit.reward", "--rollout.sampler", "TransformersSampler"),
        *("--rollout.sampling.max_response_tokens", "8", "--data.max_prompt_tokens", "64", "--data.batch_size", "2"),
        *("--trainer.max_epochs", "2", "--trainer.precision", "bf16-mixed", "--checkpoint.every_n_updates", "1"),
        *("--trainer.default_root_dir", str(tmp_path / "run")),
    ]
    process = subprocess.Popen(command)
    checkpoints = tmp_path / "run" / "checkpoints"
    while process.poll() is None and not (checkpoints.is_dir() and any(checkpoints.iterdir())):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run(command, check=True, timeout=300)
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
