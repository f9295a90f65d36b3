"""Critics: the values of response tokens, and what is refused before weights load."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from rlhf_pl.models.compute import Compute
from rlhf_pl.models.lora import LoRA
from rlhf_pl.models.packed_batch import pack
from rlhf_pl.models.shared_prefix import takes_prefix_groups
from rlhf_pl.models.source import ModelSource
from rlhf_pl.models.value_model import ValueLM, check_critic, load_critic
from rlhf_pl.utils.errors import InputError
from tests.conftest import make_tokenizer, save_llama, save_reward_model
from tests.models.test_policy import GROUPS, SMALL

OPTION = "model.critic.model"


def critic_source(folder: Path) -> ModelSource:
    return ModelSource(str(folder), option=OPTION)


def save_classifier(folder: Path, architecture: str, **changes: Any) -> Path:
    """A random classifier of an architecture, with weights that make attention matter."""
    config = getattr(transformers, f"{architecture}Config")(
        **SMALL | {"vocab_size": 400, "num_labels": 1, "pad_token_id": 1, "initializer_range": 0.2} | changes
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def values_of(folder: Path, mean: float = 0.0) -> torch.Tensor:
    """Values by transformers' own classifier, row by row without padding, shape (targets,)."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for group in GROUPS:
        for response in group.responses:
            ids = torch.tensor([[*group.prompt, *response]])
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
            found.append(model.score(hidden)[len(group.prompt) - 1 : -1, 0] - mean)
    return torch.cat(found)


def given_to(critic: ValueLM) -> torch.Tensor:
    inputs = pack(GROUPS).inputs()
    return critic(**{name: value for name, value in inputs.items() if name != "targets"})


@pytest.mark.parametrize(
    ("architecture", "attention", "shares"),
    [("Llama", "sdpa", True), ("GPTNeoX", "sdpa", True), ("Qwen2", "eager", False), ("Mistral", "sdpa", True)],
)
@torch.no_grad()
def test_values_equal_those_of_the_plain_classifier(
    architecture: str, attention: str, shares: bool, tmp_path: Path
) -> None:
    folder = save_classifier(tmp_path, architecture)
    model = load_critic(critic_source(folder), seed=1, attn_implementation=attention)
    assert takes_prefix_groups(model) == shares
    values = given_to(ValueLM(model))
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, values_of(folder), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_reward_models_mean_score_is_subtracted(reward_model: Path, tmp_path: Path) -> None:
    folder = save_reward_model(tmp_path / "mean")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"bias": 2.5}))
    values = given_to(ValueLM(load_critic(critic_source(folder), seed=1)))
    torch.testing.assert_close(values, values_of(reward_model, mean=2.5), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_causal_lm_gets_a_small_head_by_the_seed(llama: Path) -> None:
    heads = [load_critic(critic_source(llama), seed).score.weight for seed in (1, 1, 2)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    width = heads[0].shape[1]
    assert 0.7 < float(heads[0].std()) * (width + 1) ** 0.5 < 1.3
    backbone = load_critic(critic_source(llama), 1).base_model.state_dict()
    stored = load_file(llama / "model.safetensors")
    assert all(torch.equal(backbone[name.removeprefix("model.")], t) for name, t in stored.items() if "model." in name)


def test_bfloat16_compute_keeps_values_and_gradients_in_float32(reward_model: Path) -> None:
    source = critic_source(reward_model)
    compute = Compute(dtype=torch.bfloat16)
    critic, exact = ValueLM(load_critic(source, 1, compute=compute), compute), ValueLM(load_critic(source, 1))
    values, expected = given_to(critic), given_to(exact)
    assert values.dtype == torch.float32
    assert 0 < float((values - expected).detach().abs().max()) < 0.1 * float(expected.detach().std())
    for unit, total in ((critic, values), (exact, expected)):
        total.square().sum().backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in unit.parameters())
    head, wanted = critic.model.score.weight.grad, exact.model.score.weight.grad
    assert (head - wanted).norm() < 0.05 * wanted.norm()


def test_adapters_train_with_the_head_alone(reward_model: Path) -> None:
    model = load_critic(critic_source(reward_model), 1, LoRA(rank=2))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {"score.weight"} == {name for name in trained if ".lora_" not in name}
    with torch.no_grad():  # adapters start without effect
        torch.testing.assert_close(given_to(ValueLM(model)), values_of(reward_model), rtol=1e-5, atol=1e-5)


def refuse(folder: Path, policy: ModelSource, longest: int | None = None) -> str:
    with pytest.raises(InputError) as refused:
        check_critic(critic_source(folder), policy, longest, with_weights=True)
    assert OPTION in str(refused.value)
    return str(refused.value)


def test_what_does_not_fit_the_policy_is_refused(source: ModelSource, reward_model: Path, tmp_path: Path) -> None:
    check_critic(critic_source(reward_model), source, 500, with_weights=True)
    assert "has 512 positions, but prompts and responses may have 513" in refuse(reward_model, source, 513)

    other = save_reward_model(tmp_path / "other")
    tokens = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[20:22]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokens))
    assert f"the token {first!r}, id {vocabulary[second]} of the policy" in refuse(other, source)

    assert "has 100 embeddings" in refuse(save_reward_model(tmp_path / "few", vocab_size=100), source)
    encoder = save_classifier(tmp_path / "encoder", "Bert")
    assert "no classifier with one linear layer" in refuse(encoder, source)
    truncated = save_reward_model(tmp_path / "truncated")
    state = load_file(truncated / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, truncated / "model.safetensors", {"format": "pt"})
    assert "model.norm.weight" in refuse(truncated, source)
    refuse(tmp_path / "nothing", source)


def test_a_longer_vocabulary_is_fine(source: ModelSource, tmp_path: Path) -> None:
    """As of a reward model that was given a padding token."""
    folder = save_reward_model(tmp_path / "padded", vocab_size=420)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|pad|>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    check_critic(critic_source(folder), source, None, with_weights=True)


def test_a_policy_can_be_its_own_critic(tmp_path: Path) -> None:
    source = ModelSource(str(save_llama(tmp_path / "llama")))
    check_critic(source, source, None, with_weights=True)
