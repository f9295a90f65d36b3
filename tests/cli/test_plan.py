"""`rlhf-pl plan`: its estimates, compared with built models and measured steps."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_pl.__main__ import main
from rlhf_pl.models.chat import encode_prompt
from rlhf_pl.models.footprint import Kernels, activation_bytes, classifier_size, head_bytes, head_size, model_size
from rlhf_pl.models.lora import LoRA, add_lora
from rlhf_pl.models.policy import load_lm, train_last_layers
from rlhf_pl.models.source import ModelSource
from rlhf_pl.models.value_head import make_value_head
from rlhf_pl.models.value_model import load_critic
from rlhf_pl.utils.disk import format_bytes
from rlhf_pl.utils.errors import InputError
from tests.conftest import save_llama

MEASURE = """
import json, sys, threading, time
from rlhf_pl.utils.memory import resident_gib
from rlhf_pl.modules import RebelModule
from rlhf_pl.optim import AdamW
from rlhf_pl.models.packed_batch import PrefixGroup, pack
module = RebelModule(sys.argv[1], gradient_checkpointing=sys.argv[2] == "1", logprob_chunk_tokens=512)
module.source.tokenizer
import transformers.models.llama.modeling_llama
before, peak, done = resident_gib(), [0.0], threading.Event()
def watch():
    while not done.is_set():
        peak[0] = max(peak[0], resident_gib())
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
module.configure_model()
optimizer = AdamW(module.parameters(), lr=1e-5)
group = PrefixGroup([5] * 128, ([7] * 64, [8] * 64))
def backward(groups):
    module.policy(**pack(groups).inputs()).sum().backward()
backward([group])  # the optimizer's moments are created in the next step
optimizer.step()
optimizer.zero_grad()
backward([group])  # creates gradients that the next call accumulates to
backward([group] * 6)
optimizer.step()
done.set()
print(json.dumps(peak[0] - before))
"""


@pytest.mark.slow(minutes=0.3)
@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_memory_of_a_training_step_is_within_8_percent(tmp_path: Path, checkpointing: bool) -> None:
    sizes: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8}
    model = save_llama(tmp_path / "llama", num_attention_heads=12, num_key_value_heads=4, vocab_size=32000, **sizes)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(model), str(int(checkpointing))],
        capture_output=True,
        text=True,
        timeout=300,
        # glibc returns freed memory at once, as the fragmentation of its heap varies between runs
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**17)},
    )
    assert done.returncode == 0, done.stderr
    config = ModelSource(str(model)).config
    weights = 4 * model_size(config).total
    activations = activation_bytes(config, 1, 6 * 256, Kernels(half=False), checkpointing)
    planned = (
        4 * weights + activations + head_bytes(config, 512, False, False)
    ) / 2**30  # parameters, gradients, two moments
    assert planned == pytest.approx(json.loads(done.stdout), rel=0.08)


@pytest.mark.parametrize(
    ("measured", "bytes_a_parameter", "liger"),
    [(22.2, 8, True), (26.9, 8, False), (33.7, 4 + 2 + 4 + 8, True)],
    ids=["bfloat16 weights", "without liger-kernel", "bf16-mixed"],
)
def test_peaks_on_a_gpu_match_measured_ones(measured: float, bytes_a_parameter: int, liger: bool) -> None:
    """GiB on an H100 (benchmarks/README.md): 1.24 B, micro-batches of 8 chat pairs, the largest of 9,533 tokens."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        head_dim=64, vocab_size=128_256, tie_word_embeddings=True,
    )  # fmt: skip
    held = bytes_a_parameter * model_size(config).total
    activations = activation_bytes(config, 1, 9533, Kernels(half=True, flash=True, liger=liger), False)
    assert (held + activations + head_bytes(config, 1024, True, True)) / 2**30 == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("tied", [True, False])
def test_trainable_parameters_are_counted(tmp_path: Path, tied: bool) -> None:
    source = ModelSource(str(save_llama(tmp_path / "llama", tie_word_embeddings=tied)))

    def trainable(lm: Any) -> int:
        return sum(p.numel() for p in lm.parameters() if p.requires_grad)

    lm = load_lm(source)
    size = model_size(source.config)
    assert size.total == size.trainable == size.rest + size.layers * size.layer == trainable(lm)
    add_lora(lm, LoRA(rank=3), 0, train_head=False)
    assert model_size(source.config, lora=LoRA(rank=3)).trainable == trainable(lm)
    lm = load_lm(source)
    train_last_layers(lm, 1, source)
    norm = source.config.hidden_size
    assert model_size(source.config, trainable_layers=1).trainable == trainable(lm) - norm


def test_a_base_in_4_bits_counts_at_its_width(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], write_jsonl: Any
) -> None:
    pytest.importorskip("bitsandbytes")
    llama = save_llama(tmp_path / "llama", hidden_size=256, intermediate_size=512)
    source, lora = ModelSource(str(llama)), LoRA(rank=4)
    size = model_size(source.config, lora=replace(lora, base_dtype="nf4"))
    whole = model_size(source.config, lora=lora)
    lm = load_lm(source, "bfloat16", base_dtype="nf4")
    states = [p.quant_state for p in lm.parameters() if hasattr(p, "quant_state")]
    scales = sum(t.nbytes for state in states for t in (state.absmax, state.state2.absmax))
    weights = sum(p.nbytes for p in lm.parameters()) + scales
    assert size.weight_bytes(2) - 2 * size.adapters == pytest.approx(weights, rel=0.001)
    assert whole.weight_bytes(2) == 2 * whole.total > 2 * size.weight_bytes(2)
    assert whole.checkpoint_bytes(2) == 2 * (whole.total + 2 * whole.adapters)
    assert size.checkpoint_bytes(2) == 6 * size.adapters
    options = ["--model", "SFTModule", "--model.policy", source.path, "--model.dtype", "bfloat16", "--data"]
    options += ["SFTDataModule", "--data.conversations", write_jsonl([{"prompt": "Hi", "response": "Ho"}] * 9)]
    options += ["--model.lora", "LoRA", "--model.lora.rank", "4", "--model.lora.base_dtype", "nf4"]
    options += ["--data.max_tokens", "100"]
    assert main(["plan", *options, "--tflops", "1", "--trainer.accelerator", "cpu"]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"│ parameters +│ +{format_bytes(size.weight_bytes(2))} ", out)
    assert re.search(rf"│ a checkpoint +│ +{format_bytes(size.checkpoint_bytes(2))} ", out)


def test_sharding_divides_the_parameters(capsys: pytest.CaptureFixture[str], llama: Path, tmp_path: Path) -> None:
    text = "Hello " * 300
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": text}) + '\n{"prompt": "Hello"}\n')
    longest = len(encode_prompt(ModelSource(str(llama)).tokenizer, [{"role": "user", "content": text}]))
    arguments = ["plan", "--model.policy", str(llama), "--data.prompts", str(tmp_path / "prompts.jsonl")]
    arguments += ["--rollout.reward", "examples.short_answer.score", "--trainer.accelerator", "cpu", "--tflops", "1"]
    arguments += ["--data.max_prompt_tokens", str(longest)]
    tables = {}
    for devices, strategy in ((1, "auto"), (4, "fsdp2")):
        spread = ["--trainer.devices", str(devices), "--trainer.strategy", strategy]
        assert main([*arguments, *spread]) == 0
        tables[devices] = capsys.readouterr().out
    parameters = {devices: float(_cell(table, "parameters").split()[0]) for devices, table in tables.items()}
    assert parameters[4] == pytest.approx(parameters[1] / 4, rel=0.01)
    assert "gathered unit" in tables[4]
    checkpoint = float(_cell(tables[1], "a checkpoint").split()[0])
    assert checkpoint == pytest.approx(3 * parameters[1], rel=0.01)
    total = _cell(tables[1], "checkpoints, 3 at most").split()
    assert total[1] == "MiB", "the other is in KiB"
    assert float(total[0]) == pytest.approx(3 * checkpoint / 1024, abs=0.06)
    for row in ("exported model", "responses of 3 rounds", "free now"):
        assert row in tables[1]
    accumulate = ["--trainer.accumulate_grad_batches", "4"]
    activations = []
    for budget in ("1", "1000000"):  # one response of a pair, and all 16 pairs of an update
        assert main([*arguments, *accumulate, "--data.max_tokens_per_batch", budget]) == 0
        activations.append(_cell(capsys.readouterr().out, "activations"))
    assert [text.split()[1] for text in activations] == ["MiB", "GiB"]
    one, both = longest + 256, longest + 512
    for budget in (one, both):  # the longest prompt with one response of 256 tokens, and with both
        assert main([*arguments, *accumulate, "--data.max_tokens_per_batch", str(budget)]) == 0
        activations.append(_cell(capsys.readouterr().out, "activations"))
    part, pair = (float(text.split()[0]) for text in activations[2:])
    assert pair * (one / both) ** 2 < part < pair * one / both  # plain attention grows with the square
    assert main([*arguments, "--device_memory_gib", "0.001"]) == 1
    assert "Does not fit" in capsys.readouterr().out


def _cell(table: str, row: str) -> str:
    return next(line for line in table.splitlines() if f"│ {row}" in line).split("│")[2].strip()


def test_the_engine_gets_the_memory_that_the_trainer_leaves(llama: Path) -> None:
    """The trainer needs float32 weights, two moments of the trainable ones, and bfloat16 copies.

    Of a GPU of 80 GiB, 10 GiB are the trainer's and 4 GiB are a margin.
    """
    from rlhf_pl.models.compute import Compute
    from rlhf_pl.models.footprint import trainer_bytes
    from rlhf_pl.models.policy import PolicyLM
    from rlhf_pl.rollout.vllm_checks import compute_engine_share

    source = ModelSource(str(llama))
    cpu = torch.device("cpu")
    total = model_size(source.config).total
    for compute, trained, bytes_a_weight in (
        (Compute(), True, 12),
        (Compute(dtype=torch.bfloat16), True, 14),
        (Compute(dtype=torch.bfloat16, sharded=True), True, 12),
        (Compute(), False, 4),
    ):
        module = torch.nn.Module()
        module.policy = PolicyLM(load_lm(source), compute=compute).requires_grad_(trained)
        assert trainer_bytes(module, cpu) == bytes_a_weight * total
        assert trainer_bytes(module, torch.device("cuda")) == 0
    assert compute_engine_share(80 * 2**30, 10 * 2**30) == pytest.approx(1 - 14 / 80, abs=1e-3)
    with pytest.raises(InputError, match="leaves no room for an engine"):
        compute_engine_share(80 * 2**30, 74 * 2**30)


def test_responses_to_other_prompts_take_a_second_forward_pass(
    capsys: pytest.CaptureFixture[str], llama: Path, tmp_path: Path
) -> None:
    """A forward pass is 2 of the 6 FLOPs that training takes for each parameter and token."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Hello"}\n')
    arguments = ["plan", "--model.policy", str(llama), "--data.prompts", str(tmp_path / "prompts.jsonl")]
    arguments += ["--rollout.reward", "examples.short_answer.score", "--trainer.accelerator", "cpu"]
    seconds: list[dict[str, float]] = []
    for name in ("Relative", "Spread"):
        loss = f"tests.data.test_group_parts.{name}"
        assert main([*arguments, "--tflops", "1e-8", "--model.loss", loss]) == 0
        out = capsys.readouterr().out
        assert ("forward pass before each update, which makes training 1.33 times as long" in out) == (not seconds)
        seconds.append(_seconds(out))
    both, one = seconds
    assert both["train"] == pytest.approx(one["train"] * 8 / 6, rel=0.01)
    assert both["log-probs"] == pytest.approx(2 * one["log-probs"], rel=0.01)


def test_the_parameters_of_a_critic_are_counted(tmp_path: Path) -> None:
    source = ModelSource(str(save_llama(tmp_path / "llama")))

    def trainable(model: Any) -> int:
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    for lora in (None, LoRA(rank=3)):
        model = load_critic(source, 0, lora)
        size = classifier_size(source, lora)
        assert size.trainable == trainable(model)
        assert size.total == sum(p.numel() for p in model.parameters())
    assert head_size(source.config).total == trainable(make_value_head(load_lm(source), source, 0))


def test_a_critic_takes_memory_disk_and_time(capsys: pytest.CaptureFixture[str], llama: Path, tmp_path: Path) -> None:
    """A critic as large as the policy, less its output head; a head on the policy; and adapters."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Hello"}\n')
    arguments = ["plan", "--data.prompts", str(tmp_path / "prompts.jsonl"), "--tflops", "1e-8"]
    arguments += ["--rollout.reward", "examples.short_answer.score", "--trainer.accelerator", "cpu"]
    arguments += ["--rollout.sampling.num_responses", "1", "--model.gradient_checkpointing", "true"]
    arguments += ["--trainer.precision", "32-true"]
    critic = ["--model", "PPOModule", "--model.policy", str(llama)]
    tables = {}
    for name, options in {
        "policy": ["--model", "RebelModule", "--model.policy", str(llama), "--model.loss", "ReinforcePlusPlusLoss"],
        "whole": critic,
        "shared": [*critic, "--model.critic.shares_trunk", "true"],
        "adapters": [*critic, "--model.critic.lora", "LoRA", "--model.critic.lora.rank", "2"],
    }.items():
        assert main([*arguments, *options]) == 0
        tables[name] = capsys.readouterr().out
    bytes_of = {name: 4 * classifier_size(ModelSource(str(llama)), lora).total for name, lora in
                (("whole", None), ("adapters", LoRA(rank=2)))}  # fmt: skip
    for name, size in bytes_of.items():
        assert _cell(tables[name], "critic parameters") == format_bytes(size)
    assert _cell(tables["whole"], "critic optimizer") == format_bytes(2 * bytes_of["whole"])
    assert _cell(tables["whole"], "critic gradients") == format_bytes(bytes_of["whole"])
    assert _cell(tables["whole"], "critic activations") == _cell(tables["whole"], "activations")
    assert "critic activations" not in tables["shared"]
    assert "critic activations" in tables["adapters"]
    policy, whole, shared, adapters = (_seconds(table) for table in tables.values())
    assert "critic" not in tables["policy"]
    # log-probs of pi_old take a forward pass, and the old values another one
    assert shared["log-probs"] == pytest.approx(2 * policy["log-probs"], rel=0.01)
    assert whole["log-probs"] == pytest.approx(2 * policy["log-probs"], rel=0.5)
    assert policy["train"] < shared["train"] * 1.01 < adapters["train"] < whole["train"]
    both = 4 * model_size(ModelSource(str(llama)).config).total + bytes_of["whole"]
    assert _cell(tables["whole"], "a checkpoint") == format_bytes(3 * both)


def test_a_damaged_critic_is_refused(capsys: pytest.CaptureFixture[str], llama: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Hello"}\n')
    damaged = save_llama(tmp_path / "critic")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    arguments = ["plan", "--model", "PPOModule", "--model.policy", str(llama), "--model.critic.model", str(damaged)]
    arguments += ["--data.prompts", str(tmp_path / "prompts.jsonl"), "--rollout.reward", "examples.short_answer.score"]
    assert main(arguments) == 1
    assert "`model.critic.model`" in capsys.readouterr().err


def _seconds(table: str) -> dict[str, float]:
    """Seconds of a plan's phases by name."""
    lines = [line for line in table.splitlines() if "│ seconds" in line or "time, " in line]
    names, values = ([cell.strip() for cell in line.replace("┃", "│").split("│")[2:-1]] for line in lines)
    return {name: float(value.strip("< ").replace(",", "")) for name, value in zip(names, values, strict=True)}
