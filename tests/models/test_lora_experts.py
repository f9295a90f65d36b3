"""Adapters on experts: the merged, exported and synced weights are those of the model that trains."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rlhf_pl.callbacks import HFExport, RoundCheckpoint
from rlhf_pl.distributed.gather_weights import like_of, weights_of
from rlhf_pl.models.compute import Compute
from rlhf_pl.models.lora import (
    LoRA,
    adapted_layers,
    adapter_size,
    adapter_targets,
    add_lora,
    merged_tensors,
    save_adapter,
    without_adapters,
)
from rlhf_pl.models.packed_batch import PrefixGroup, pack
from rlhf_pl.models.policy import PolicyLM
from rlhf_pl.models.source import ModelSource
from rlhf_pl.rollout import EngineSpec, PromptTokens, SamplingConfig, TransformersSampler, VLLMSampler
from rlhf_pl.rollout.checkpoint_format import make_checkpoint_converter
from rlhf_pl.rollout.weight_sync.self_check import sync_weights
from rlhf_pl.utils.errors import InputError
from tests.conftest import make_tokenizer
from tests.integration.test_fit import PROMPTS, fit
from tests.modules.test_pairwise_lora import constant_lr

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
FEW = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
KINDS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": FEW | {"mlp_only_layers": [0], "head_dim": 16},  # its first layer is dense
    "Qwen2Moe": FEW | {"shared_expert_intermediate_size": 32},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},  # its matrices are transposed
    "Phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},  # its router is a linear layer that returns a tuple
}


def save_moe(folder: Path, kind: str, **changes: Any) -> Path:
    import transformers

    tokenizer = make_tokenizer()
    config = getattr(transformers, f"{kind}Config")(vocab_size=len(tokenizer), **(SIZES | KINDS[kind] | changes))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def plain(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def adapted(folder: Path, settings: LoRA, seed: int = 2) -> Any:
    """A model with adapters that are not zero."""
    lm = plain(folder)
    add_lora(lm, settings, seed=1, train_head=False)
    random = torch.Generator().manual_seed(seed)
    for name, parameter in lm.named_parameters():
        if ".lora_B." in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=random)
    return lm


def merged(lm: Any) -> dict[str, Tensor]:
    return dict(merged_tensors(lm, lambda wanted: ((n, t) for n, t in lm.state_dict().items() if wanted(n))))


@torch.no_grad()
def logits(lm: Any) -> Tensor:
    return lm(input_ids=torch.arange(3, 60)[None] % 300).logits


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_model_equals_the_adapted_one(tmp_path: Path, kind: str) -> None:
    """Every weight of the experts is adapted; without adapters the model is the base; peft reads the same adapters."""
    folder = save_moe(tmp_path / "base", kind)
    base, settings = plain(folder), LoRA(rank=3)
    lm = adapted(folder, settings)
    names = {n for n, p in base.named_parameters() if p.dim() == 3}
    assert names
    assert set(adapter_targets(base, settings).parameters) == names
    trained = [p for p in lm.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == adapter_size(base, settings)
    whole = merged(lm)
    before = base.state_dict()
    assert whole.keys() == before.keys() == like_of(lm).keys()
    assert all(not torch.equal(whole[name], before[name]) for name in names)
    expected = logits(lm)
    assert (expected - logits(base)).abs().max() > 0.05
    with without_adapters(lm):
        torch.testing.assert_close(logits(lm), logits(base))
    base.load_state_dict(whole)
    torch.testing.assert_close(logits(base), expected, atol=1e-4, rtol=1e-3)
    adapters = {n: t for n, t in lm.state_dict().items() if ".lora_" in n}
    save_adapter(
        settings, adapter_targets(plain(folder), settings), lm, adapters, str(folder), str(tmp_path / "adapter")
    )
    is_readable = kind != "Qwen3Moe"  # peft takes the names of its dense layers for those of experts
    assert (tmp_path / "adapter").exists() == is_readable
    if is_readable:
        from peft import PeftModel

        read = PeftModel.from_pretrained(plain(folder), tmp_path / "adapter").eval()
        torch.testing.assert_close(logits(read), expected, atol=1e-4, rtol=1e-3)


def test_gradients_are_those_of_the_merged_weights(tmp_path: Path) -> None:
    """dL/dA = B^T dL/dW scaled, for one expert, with dL/dW from the plain model of the merged weights."""
    folder = save_moe(tmp_path / "base", "Mixtral")
    lm = adapted(folder, LoRA(rank=2, alpha=6.0))
    ids = torch.arange(3, 40)[None]
    lm(input_ids=ids).logits.logsumexp(-1).sum().backward()
    base = plain(folder)
    base.load_state_dict(merged(lm))
    base(input_ids=ids).logits.logsumexp(-1).sum().backward()
    gradient = base.model.layers[0].mlp.experts.down_proj.grad[1]
    wrappers = [m for m in lm.model.layers[0].mlp.modules() if getattr(m, "parameter_name", "") == "down_proj"]
    (wrapper,) = wrappers
    down, up = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
    up_1 = up.reshape(up.shape[0], 2, 4)[:, :, 1]  # (out, rank) of expert 1
    found = down.grad.reshape(4, 2, -1)[1]
    torch.testing.assert_close(found, 3.0 * up_1.T @ gradient, atol=1e-4, rtol=1e-3)


def test_half_precision_copies_of_adapters_count(tmp_path: Path) -> None:
    """`bf16-mixed` computes with a module whose weights are copies."""
    folder = save_moe(tmp_path / "base", "Mixtral")
    batch = pack([PrefixGroup([5, 6, 7], ([8, 9], [10, 11, 12]))])
    lm = adapted(folder, LoRA(rank=3))
    found = {}
    for dtype in (None, torch.bfloat16):
        policy = PolicyLM(lm, compute=Compute(torch.device("cpu"), dtype))
        logps = policy(**batch.inputs())
        found[dtype] = logps.detach()
        for _ in range(2):
            logps = policy(**batch.inputs())
        logps.sum().backward()
    assert (found[torch.bfloat16] - found[None]).abs().max() < 0.15
    with without_adapters(lm), torch.no_grad():
        assert (policy(**batch.inputs()) - found[None]).abs().max() > 0.15


@pytest.mark.parametrize("kind", KINDS)
def test_vllm_gets_the_tensors_of_checkpoints(tmp_path: Path, kind: str) -> None:
    folder = save_moe(tmp_path / "base", kind)
    stored = load_file(folder / "model.safetensors")
    sent = dict(make_checkpoint_converter(ModelSource(str(folder)))(iter(plain(folder).state_dict().items())))
    assert sent.keys() == stored.keys()
    assert all(torch.equal(sent[name], stored[name]) for name in stored)


@pytest.mark.parametrize("settings", [LoRA(rank=4), LoRA(rank=4, target_modules=[], target_parameters=["down_proj"])])
def test_a_run_resumes_and_exports_the_model_that_it_trained(
    tmp_path: Path, write_jsonl: Callable[..., str], settings: LoRA
) -> None:
    folder, prompts = save_moe(tmp_path / "base", "Mixtral"), write_jsonl(PROMPTS)
    module = {"lora": settings, "kl_coef": 0.05, "lr_scheduler": constant_lr, "gradient_checkpointing": True}
    runs: dict[str, Any] = {}
    callbacks: Callable[[], list[Any]] = lambda: [HFExport(), RoundCheckpoint()]  # noqa: E731
    _, runs["whole"] = fit(tmp_path / "whole", folder, prompts, callbacks(), module, enable_checkpointing=True)
    fit(tmp_path / "parts", folder, prompts, callbacks(), module, max_epochs=1, enable_checkpointing=True)
    checkpoint = str(next((tmp_path / "parts").glob("checkpoints/after-round-*.ckpt")))
    again = {"ckpt_path": checkpoint, "enable_checkpointing": True}
    fit(tmp_path / "parts", folder, prompts, callbacks(), module, **again)
    expected = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    found = load_file(tmp_path / "parts" / "model" / "model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    before = load_file(folder / "model.safetensors")
    assert any("experts" in name and not torch.equal(before[name], expected[name]) for name in expected)
    attention = any("q_proj" in name and not torch.equal(before[name], expected[name]) for name in expected)
    assert attention == (settings.target_modules is None)
    lm = runs["whole"].policy.lm.eval()
    torch.testing.assert_close(logits(plain(tmp_path / "whole" / "model")), logits(lm), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_parameters": ["gate_up_prj"]}, r"target_parameters` names gate_up_prj; .* down_proj, gate_up_proj"),
        ({"target_modules": [], "target_parameters": []}, "has no linear layers|names none"),
        ({"dropout": 0.1}, r"`model\.lora\.dropout` is 0.1, but adapters of experts"),
    ],
)
def test_settings_that_match_nothing_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    lm = plain(save_moe(tmp_path / "base", "Mixtral"))
    with pytest.raises(InputError, match=message):
        adapter_targets(lm, LoRA(**settings))


def test_a_model_without_experts_has_no_such_weights(llama: Path) -> None:
    assert adapter_targets(plain(llama), LoRA()).parameters == []
    with pytest.raises(InputError, match=r"target_parameters` names down_proj; the fused weights .* are none"):
        adapter_targets(plain(llama), LoRA(target_parameters=["down_proj"]))
    assert adapter_targets(plain(llama), LoRA(dropout=0.1)).layers


def test_layers_that_a_model_never_calls_get_no_adapters() -> None:
    """Mamba's `dt_proj`: its weights are read by the mixer itself, so only the merged model would change."""
    from transformers import AutoModelForCausalLM, JambaConfig

    few = {"num_experts": 4, "mamba_d_state": 4, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1}
    config = JambaConfig(vocab_size=300, **SIZES, **few)
    lm, base = (AutoModelForCausalLM.from_config(config).eval() for _ in range(2))
    targets = adapter_targets(lm, LoRA())
    leaves = {name.split(".")[-1] for name in targets.layers}
    assert {"in_proj", "x_proj", "q_proj"} <= leaves
    assert "dt_proj" not in leaves
    with pytest.raises(InputError, match="names dt_proj"):
        adapter_targets(lm, LoRA(target_modules=["dt_proj"]))
    add_lora(lm, LoRA(rank=2), seed=0, train_head=False)
    for name, parameter in lm.named_parameters():
        if ".lora_B." in name:
            parameter.data = 0.1 * torch.randn(parameter.shape)
    base.load_state_dict(merged(lm))
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        expected, found = (model(input_ids=ids, use_cache=False).logits for model in (lm, base))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["Mamba", "FalconMamba"])
def test_layers_that_peft_refuses_get_no_adapters(kind: str) -> None:
    import transformers

    config = getattr(transformers, f"{kind}Config")(vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=4)
    lm = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(InputError, match=r"names out_proj; the linear layers of .* are called in_proj, x_proj"):
        adapter_targets(lm, LoRA(target_modules=["out_proj"]))
    add_lora(lm, LoRA(rank=2), seed=0, train_head=False)
    assert {name.split(".")[-1] for name in adapted_layers(lm)} == {"in_proj", "x_proj"}


VLLM = [pytest.mark.vllm, pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="no vLLM")]


@pytest.mark.parametrize("sampler", [TransformersSampler, pytest.param(VLLMSampler, marks=VLLM)])
def test_samplers_sample_from_the_adapted_experts(tmp_path: Path, sampler: Any) -> None:
    """Twice, with other weights: vLLM packs the experts' weights for its kernels."""
    folder = save_moe(tmp_path / "base", "Mixtral", head_dim=32)  # vLLM has no smaller ones on the CPU
    engine = sampler(dtype="float32") if sampler is VLLMSampler else sampler()
    engine.start(EngineSpec(ModelSource(str(folder)), 64, 4))
    for seed in (2, 3):
        lm = adapted(folder, LoRA(rank=3), seed)
        sync_weights(engine, weights_of(merged(lm)))
        sampling = SamplingConfig(1, max_response_tokens=8)
        for _, (response,) in engine.generate([PromptTokens([5, 6, 7, 8], 0)], sampling):
            ids = [5, 6, 7, 8, *response.token_ids]
            with torch.no_grad():
                logps = lm(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            expected = [logps[i - 1, ids[i]].item() for i in range(4, len(ids))]
            assert response.logps == pytest.approx(expected, abs=1e-3)
    engine.close()
