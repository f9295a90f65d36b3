"""ArmoRM on a small random checkpoint with the published layout, against an independent computation."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf_pl.models.armorm import OBJECTIVES
from rlhf_pl.rewards import ArmoRMReward, Sample
from rlhf_pl.utils.errors import InputError
from tests.conftest import make_tokenizer

HIDDEN, GATE = 32, 24
SAMPLES = [
    Sample("a", [{"role": "user", "content": "Name three colours."}], "red, green and blue"),
    Sample("b", [{"role": "user", "content": "Tell me of the sea and the hills beyond."}], "No"),
    Sample(
        "c",
        [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "How many legs do two dogs have?"},
        ],
        "Eight.",
    ),
]


@pytest.fixture(scope="module")
def armorm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as published: two shards, the backbone under `model.`, and a config that names remote code."""
    from transformers import LlamaConfig, LlamaModel

    folder = tmp_path_factory.mktemp("armorm")
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    torch.manual_seed(3)
    tensors = {f"model.{n}": t.contiguous() for n, t in LlamaModel(config).state_dict().items()}
    widths = [HIDDEN, GATE, GATE, GATE, 19]
    heads = {"regression_layer.weight": torch.randn(19, HIDDEN), "reward_transform_matrix": torch.randn(19, 19)}
    for i, (before, after) in enumerate(itertools.pairwise(widths)):
        heads |= {
            f"gating.layers.{i}.weight": torch.randn(after, before),
            f"gating.layers.{i}.bias": torch.randn(after),
        }
    heads["gating.logit_scale"] = torch.tensor([1.7])
    names = {"model-00001-of-00002.safetensors": tensors, "model-00002-of-00002.safetensors": heads}
    for name, part in names.items():
        save_file(part, folder / name, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: name for name, part in names.items() for key in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    published = {
        "architectures": ["LlamaForRewardModelWithGating"],
        "auto_map": {"AutoModelForSequenceClassification": "modeling_custom.LlamaForRewardModelWithGating"},
        "num_objectives": 19,
        "gating_temperature": 10,
        "gating_hidden_dim": GATE,
        "gating_n_hidden": 3,
    }
    (folder / "config.json").write_text(json.dumps(config.to_dict() | published))
    tokenizer.save_pretrained(folder)
    return folder


def compute_independently(folder: Path, ids: list[int], position: int) -> tuple[float, torch.Tensor, torch.Tensor]:
    """(score, rewards, gate) of one row, implemented from the paper."""
    from transformers import AutoConfig, LlamaModel

    tensors = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    backbone = LlamaModel(AutoConfig.from_pretrained(folder))
    backbone.load_state_dict({n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")})
    with torch.no_grad():
        states = backbone.eval()(torch.tensor([ids])).last_hidden_state[0]
    rewards = tensors["regression_layer.weight"] @ states[-1]
    x = states[position]
    for i in range(4):
        x = tensors[f"gating.layers.{i}.weight"] @ x + tensors[f"gating.layers.{i}.bias"]
        if i < 3:
            x = x.clamp(min=0)
    gate = torch.exp(x / 10) / torch.exp(x / 10).sum() * tensors["gating.logit_scale"]
    score = sum(
        gate[j] * sum(rewards[i] * tensors["reward_transform_matrix"][i, j] for i in range(19)) for j in range(19)
    )
    return float(score), rewards, gate


def render_by_hand(sample: Sample) -> tuple[list[int], int]:
    """Token ids of a conversation, with the template written out, and the position of its last turn."""
    tokenizer = make_tokenizer()
    turns = [*sample.messages, {"role": "assistant", "content": sample.response}]
    text = "<s>" + "".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in turns)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    end, assistant = tokenizer.convert_tokens_to_ids(["<|end|>", "<|assistant|>"])
    return ids, max(i for i in range(len(ids) - 1) if ids[i : i + 2] == [end, assistant])


@pytest.mark.parametrize("tokens_per_batch", [1, 10_000])
def test_score_and_objectives_equal_an_independent_computation(armorm: Path, tokens_per_batch: int) -> None:
    reward = ArmoRMReward(str(armorm), tokens_per_batch=tokens_per_batch)
    reward.check(SAMPLES)
    for sample, result in zip(SAMPLES, reward.score(SAMPLES), strict=True):
        score, rewards, _ = compute_independently(armorm, *render_by_hand(sample))
        assert result.reward == pytest.approx(score, rel=1e-4, abs=1e-4)
        assert list(result.components) == list(OBJECTIVES)
        assert list(result.components.values()) == pytest.approx(rewards.tolist(), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])  # with and without shared prompts
def test_responses_to_one_prompt_score_as_each_alone(armorm: Path, attention: str) -> None:
    responses = ["red", "red, green and blue", "", "Blue. " * 12]
    samples = [replace(sample, response=response) for sample in SAMPLES for response in responses]
    reward = ArmoRMReward(str(armorm), attn_implementation=attention)
    assert reward._local.open().shares_prompts == (attention == "sdpa")
    for sample, result in zip(samples, reward.score(samples), strict=True):
        score, rewards, _ = compute_independently(armorm, *render_by_hand(sample))
        assert result.reward == pytest.approx(score, rel=1e-4, abs=1e-4)
        assert list(result.components.values()) == pytest.approx(rewards.tolist(), rel=1e-4, abs=1e-4)


def test_gate_is_read_at_the_start_of_the_last_response(armorm: Path) -> None:
    reward = ArmoRMReward(str(armorm))
    for sample in SAMPLES:
        row = reward.renderer()(sample.messages, sample.response)
        assert (row.ids, row.turn) == render_by_hand(sample)


def test_gate_is_still_found_after_truncation(armorm: Path) -> None:
    row = ArmoRMReward(str(armorm), max_tokens=12).renderer()(SAMPLES[1].messages, "No")
    end, assistant = make_tokenizer().convert_tokens_to_ids(["<|end|>", "<|assistant|>"])
    assert row.turn is not None
    assert row.ids[row.turn : row.turn + 2] == [end, assistant]
    assert row.truncated_tokens > 0


def test_objectives_can_be_selected_and_weighted(armorm: Path) -> None:
    tensors = load_file(armorm / "model-00002-of-00002.safetensors")
    _, rewards, gate = compute_independently(armorm, *render_by_hand(SAMPLES[0]))
    contributions = rewards * (tensors["reward_transform_matrix"] @ gate)
    weights = {"helpsteer-correctness": 2.0, "code-style": -1.0}
    first, last = OBJECTIVES.index("helpsteer-correctness"), OBJECTIVES.index("code-style")

    def score(**options: object) -> float:
        return ArmoRMReward(str(armorm), **options).score(SAMPLES[:1])[0].reward  # type: ignore[arg-type]

    assert score(objectives=weights) == pytest.approx(float(2 * contributions[first] - contributions[last]), rel=1e-3)
    assert score(objectives=weights, gated=False) == pytest.approx(float(2 * rewards[first] - rewards[last]), rel=1e-3)
    all_objectives = dict.fromkeys(OBJECTIVES, 1.0)
    assert score(objectives=all_objectives) == pytest.approx(score(), rel=1e-3)


def test_invalid_inputs_are_named_in_the_error(armorm: Path, reward_model: Path) -> None:
    with pytest.raises(InputError, match="names honesty; the objectives of ArmoRM are helpsteer-helpfulness"):
        ArmoRMReward(str(armorm), objectives={"honesty": 1.0})
    with pytest.raises(InputError, match=r"no num_objectives, gating_temperature.*take ClassifierReward"):
        ArmoRMReward(str(reward_model)).check(SAMPLES)
