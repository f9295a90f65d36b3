"""REBEL with adapters: the base stays unchanged and is the reference; the sampler samples from the merged model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_pl import RebelModule
from rlhf_pl.callbacks import HFExport, RoundCheckpoint
from rlhf_pl.models.lora import LoRA, without_adapters
from rlhf_pl.models.policy import load_lm
from rlhf_pl.models.source import ModelSource
from rlhf_pl.rollout import EngineSpec, PromptTokens, SamplingConfig, TransformersSampler
from rlhf_pl.store.round_store import RoundStore
from rlhf_pl.utils.errors import InputError
from tests.conftest import save_llama
from tests.integration.test_fit import PROMPTS, fit
from tests.integration.test_kill_matrix import TRANSFORMERS, make_plan, outcomes
from tests.stored_pairs import read_pairs


@pytest.fixture
def prompts(write_jsonl: Callable[..., str]) -> str:
    return write_jsonl(PROMPTS)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> tuple[Path, RebelModule]:
    import json

    folder = tmp_path_factory.mktemp("lora")
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    settings: dict[str, Any] = {"lora": LoRA(rank=4), "kl_coef": 0.05}
    _, module = fit(folder / "run", llama, str(folder / "prompts.jsonl"), [HFExport()], settings)
    return folder / "run", module


def constant_lr(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)


def token_logps(lm: Any, prompt: list[int], response: list[int]) -> float:
    """Log-prob of a response, summed over its tokens, from full logits."""
    ids = torch.tensor([prompt + response])
    with torch.no_grad():
        logps = (lm(input_ids=ids).logits[0] / 0.9).log_softmax(-1)  # the round's temperature
    return sum(logps[len(prompt) + i - 1, token].item() for i, token in enumerate(response))


def test_the_base_is_unchanged_bit_for_bit(trained: tuple[Path, RebelModule], llama: Path) -> None:
    base = load_lm(ModelSource(str(llama))).state_dict()
    state = trained[1].policy.lm.state_dict()
    found = {name.replace(".base_layer.", "."): t for name, t in state.items() if ".lora_" not in name}
    assert found.keys() == base.keys()
    assert all(torch.equal(found[name], base[name]) for name in base)
    assert any(t.abs().sum() > 0 for name, t in state.items() if ".lora_B." in name)


def test_reference_logps_are_of_the_base(trained: tuple[Path, RebelModule], llama: Path) -> None:
    stored = RoundStore(trained[0]).round(1)
    base = load_lm(ModelSource(str(llama)))
    moved = 0.0
    for pair in read_pairs(stored):
        expected = token_logps(base, pair["prompt_tokens"], pair["chosen_tokens"])
        assert pair["chosen_reference_logp"] == pytest.approx(expected, abs=1e-4)
        moved = max(moved, abs(pair["chosen_old_logp"] - expected))
    assert moved > 1e-3  # the policy of round 2 differs


def test_the_sampler_samples_from_the_adapted_policy(trained: tuple[Path, RebelModule]) -> None:
    """A synced sampler reports log-probs of the model with its adapters, which equal those of the export."""
    from transformers import AutoModelForCausalLM

    folder, module = trained
    merged = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    sampler = TransformersSampler()
    sampler.start(EngineSpec(module.source, 64, 4))
    sampler.load_weights(module.weights().stream())
    rows = RoundStore(folder).held_out(2).read("responses").to_pylist()
    requests = [PromptTokens(row["prompt_tokens"], seed) for seed, row in enumerate(rows[:4])]
    for index, (sampled,) in sampler.generate(requests, SamplingConfig(1, max_response_tokens=8)):
        prompt, response = requests[index].token_ids, sampled.token_ids
        for model in (merged, module.policy.lm.eval()):
            ids = torch.tensor([prompt + response])
            with torch.no_grad():
                logps = model(input_ids=ids).logits[0].log_softmax(-1)
            total = sum(logps[len(prompt) + i - 1, token].item() for i, token in enumerate(response))
            assert sum(sampled.logps) == pytest.approx(total, abs=1e-3)


def test_the_exported_adapter_loads_in_peft(trained: tuple[Path, RebelModule], llama: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, module = trained
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, folder / "model" / "adapter").eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = module.policy.lm.eval()(input_ids=ids).logits
        torch.testing.assert_close(adapted(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
        with without_adapters(module.policy.lm):
            assert not torch.allclose(module.policy.lm(input_ids=ids).logits, expected, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora": LoRA(dropout=0.1)}, "model.lora.dropout"),
        ({"lora": LoRA(), "trainable_layers": 1}, "exclude each other"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str, llama: Path) -> None:
    with pytest.raises(InputError, match=message):
        RebelModule(str(llama), **settings)


@pytest.mark.slow
def test_adapters_train_equally_on_shards(tmp_path: Path, write_jsonl: Callable[..., str]) -> None:
    plan = make_plan(tmp_path, [*TRANSFORMERS, "--model.lora", "LoRA", "--model.kl_coef", "0.05"])
    spread = {"one": ("auto", 1), "ddp": ("ddp", 2), "fsdp": ("fsdp", 2), "fsdp2": ("fsdp2", 2)}
    runs = [
        {
            "dir": str(tmp_path / name),
            "ranks": ranks,
            "arguments": [
                *("--trainer.devices", str(ranks), "--trainer.strategy", strategy),
                *("--trainer.accumulate_grad_batches", str(2 // ranks)),
            ],
        }
        for name, (strategy, ranks) in spread.items()
    ]
    for run, outcome in zip(runs, outcomes(tmp_path, plan, runs), strict=True):
        assert set(outcome["every"]) == {0}, Path(f"{run['dir']}.log").read_text()
    for part in ("model.safetensors", "adapter/adapter_model.safetensors"):
        expected = load_file(tmp_path / "one" / "model" / part)
        for name in ("ddp", "fsdp", "fsdp2"):
            found = load_file(tmp_path / name / "model" / part)
            assert found.keys() == expected.keys()
            for tensor in expected:
                torch.testing.assert_close(found[tensor], expected[tensor], rtol=0, atol=2e-5)


@pytest.mark.slow
def test_a_base_in_4_bits_trains_adapters_resumes_and_exports(tmp_path: Path, prompts: str) -> None:
    """A resumed run, from checkpoints of only the adapters, equals an uninterrupted one; the export has the
    dequantized weights."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM

    llama = save_llama(tmp_path / "llama", hidden_size=128, intermediate_size=128)
    settings: dict[str, Any] = {"lora": LoRA(rank=4, base_dtype="nf4"), "kl_coef": 0.05, "lr_scheduler": constant_lr}
    _, module = fit(
        tmp_path / "whole", llama, prompts, [HFExport(), RoundCheckpoint()], settings, enable_checkpointing=True
    )
    fit(
        tmp_path / "parts",
        llama,
        prompts,
        [HFExport(), RoundCheckpoint()],
        settings,
        max_epochs=1,
        enable_checkpointing=True,
    )
    checkpoint = next((tmp_path / "parts").glob("checkpoints/after-round-*.ckpt"))
    assert all(".lora_" in name for name in torch.load(checkpoint, weights_only=True)["state_dict"])
    again = {"ckpt_path": str(checkpoint), "enable_checkpointing": True}
    fit(tmp_path / "parts", llama, prompts, [HFExport(), RoundCheckpoint()], settings, **again)
    expected = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    found = load_file(tmp_path / "parts" / "model" / "model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "model", dtype=torch.float32)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        quantized = module.policy.lm.eval()(input_ids=ids).logits
        plain = load_lm(ModelSource(str(llama)))(input_ids=ids).logits
        torch.testing.assert_close(exported(input_ids=ids).logits, quantized, rtol=1e-3, atol=1e-3)
    assert (quantized - plain).abs().max() > 0.01, "the 4-bit weights equal the 32-bit ones"
    layer = module.policy.lm.model.layers[0].self_attn.q_proj.base_layer.weight
    assert layer.dtype == torch.uint8


@pytest.mark.parametrize("names", [["q_proj", "v_prj"], []])
def test_names_that_match_nothing_are_refused_with_a_list_of_valid_ones(
    tmp_path: Path, llama: Path, write_jsonl: Callable[..., str], names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any weights load."""
    monkeypatch.setattr("rlhf_pl.modules.causal_lm.load_lm", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(InputError, match=r"`model\.lora\.target_modules` names (v_prj|none); .*down_proj.*q_proj"):
        fit(tmp_path, llama, write_jsonl(PROMPTS), module={"lora": LoRA(rank=2, target_modules=names)})


def test_a_reference_that_lacks_the_policys_tokens_is_refused_before_any_weights_load(
    tmp_path: Path, llama: Path, prompts: str
) -> None:
    smaller = save_llama(tmp_path / "smaller", vocab_size=300)
    with pytest.raises(InputError, match=r"`model.reference`: .* has 300 embeddings, .* has \d+ tokens"):
        fit(tmp_path / "run", llama, prompts, module={"kl_coef": 0.1, "reference": str(smaller)})
    with pytest.raises(InputError, match=r"`model.reference`: no folder"):
        fit(tmp_path / "run", llama, prompts, module={"kl_coef": 0.1, "reference": str(tmp_path / "nowhere")})
