"""Training in eval mode: log-probs equal those at sampling, whatever an architecture does in train mode."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import modeling_utils

from rlhf_pl import LoRA
from rlhf_pl.models.lora import add_lora
from rlhf_pl.models.packed_batch import PrefixGroup, pack
from rlhf_pl.models.policy import PolicyLM, load_lm
from rlhf_pl.models.sequence_classifier import ClassifierLM
from rlhf_pl.models.source import ModelSource
from rlhf_pl.modules import pairwise
from rlhf_pl.modules.export import _make_meta_copy
from rlhf_pl.rewards import ClassifierReward, Sample
from rlhf_pl.utils.errors import InputError
from tests.conftest import make_tokenizer, save_llama, save_reward_model
from tests.integration.test_fit import PROMPTS, fit

ROWS = pack([PrefixGroup([5, 6, 7], ([8, 9, 10], [11, 12]))])


def save_moe(folder: Path) -> Path:
    """A Mixtral with router noise in train mode."""
    from transformers import MixtralConfig, MixtralForCausalLM

    tokenizer = make_tokenizer()
    config = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, max_position_embeddings=256, router_jitter_noise=0.5,
        initializer_range=0.3, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("checkpointing", [False, True])
def test_router_noise_is_off_and_gradient_checkpointing_still_works(
    tmp_path: Path, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = load_lm(ModelSource(str(save_moe(tmp_path))))
    calls = []
    original = modeling_utils.checkpoint

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[0])
        return original(*args, **kwargs)

    monkeypatch.setattr(modeling_utils, "checkpoint", counted)
    if checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    policy = PolicyLM(lm)
    expected = policy.eval()(**ROWS.inputs()).detach()
    policy.train()
    assert policy.training
    found = policy(**ROWS.inputs())
    assert torch.equal(found, expected)
    assert len(calls) == (2 if checkpointing else 0)  # layers
    found.sum().backward()
    assert all(p.grad is not None for p in lm.parameters())


def test_a_noisy_model_with_learning_rate_zero_keeps_its_policy(
    tmp_path: Path, write_jsonl: Callable[..., str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*(num_workers|log_every_n_steps|checkpoint|isinstance|eval mode).*")
        trainer, module = fit(
            tmp_path / "run",
            save_moe(tmp_path / "moe"),
            write_jsonl(PROMPTS),
            module={"optimizer": lambda p: pairwise.AdamW(p, lr=0.0), "gradient_checkpointing": True},
            max_epochs=1,
        )
    assert trainer.callback_metrics["train/kl_chosen"] == 0
    assert module.policy is not None
    layers = [m for m in module.policy.modules() if getattr(m, "gradient_checkpointing", False)]
    assert layers
    assert all(m.training for m in layers)  # also after evaluation


def test_weights_that_eval_mode_would_rescale_do_not_change(tmp_path: Path) -> None:
    """With this config, RWKV halves the output weights of every second layer in eval mode."""
    from transformers import AutoModelForCausalLM, RwkvConfig

    sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 4, "context_length": 128}
    plain = AutoModelForCausalLM.from_config(RwkvConfig(**sizes, rescale_every=2))
    plain.save_pretrained(tmp_path)
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    source = ModelSource(str(tmp_path))
    policy = PolicyLM(load_lm(source)).train()
    found = policy(**ROWS.inputs())
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.lm.state_dict().items())
    logps = plain.eval()(torch.tensor([[5, 6, 7, 8, 9, 10]])).logits[0].log_softmax(-1)
    torch.testing.assert_close(found[:3], logps[[2, 3, 4], [8, 9, 10]], atol=1e-5, rtol=1e-4)
    assert _make_meta_copy(policy.lm, source, torch.float32).config.rescale_every == 2


def test_router_noise_of_reward_models_is_off_too(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    folder = save_moe(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, pad_token_id=0)
    unit = ClassifierLM(model)
    ids = torch.tensor([[5, 6, 7, 8]])
    scores = [unit.train(mode)(ids, torch.ones_like(ids)) for mode in (True, False, True)]
    assert torch.equal(scores[0], scores[1])
    assert torch.equal(scores[0], scores[2])


def test_dropout_of_adapters_is_on_only_in_training(llama: Path) -> None:
    lm = load_lm(ModelSource(str(llama)))
    add_lora(lm, LoRA(rank=2, dropout=0.5), 0, train_head=False)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    policy = PolicyLM(lm).train()
    assert not torch.equal(policy(**ROWS.inputs()), policy(**ROWS.inputs()))
    policy.eval()
    assert torch.equal(policy(**ROWS.inputs()), policy(**ROWS.inputs()))


def add_token(folder: Path, template: str) -> None:
    """Add a token without an embedding, like users who add a padding token without resizing the model."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<|new|>"], special_tokens=True)
    tokenizer.pad_token = "<|new|>"
    tokenizer.chat_template = tokenizer.chat_template.replace("<|user|>", template)
    tokenizer.save_pretrained(folder)


def test_tokens_without_embeddings_are_refused_where_they_are_used(
    tmp_path: Path, write_jsonl: Callable[..., str]
) -> None:
    prompts = write_jsonl(PROMPTS)
    fine, wrong = save_llama(tmp_path / "fine"), save_llama(tmp_path / "wrong")
    add_token(fine, "<|user|>")
    template = make_tokenizer().chat_template.replace("{% for m", "<|new|>{% for m")
    add_token(wrong, "<|user|>")
    (wrong / "chat_template.jinja").write_text(template)
    fit(tmp_path / "run", fine, prompts, max_epochs=1)
    with pytest.raises(
        InputError, match=r"`data.prompts`: the token '<\|new\|>' of prompt_id '.*' has the id .* embeddings"
    ):
        fit(tmp_path / "other", wrong, prompts, max_epochs=1)
    assert not (tmp_path / "other" / "rounds").exists()
    scorer = save_reward_model(tmp_path / "rm")
    (scorer / "tokenizer.json").write_text((wrong / "tokenizer.json").read_text())
    (scorer / "chat_template.jinja").write_text(template)
    with pytest.raises(InputError, match=r"`rollout.reward.model`: the token '<\|new\|>'"):
        ClassifierReward(str(scorer)).check([Sample("a", [{"role": "user", "content": "Hi"}], "Ho")])


def test_an_eos_without_an_embedding_is_ignored(tmp_path: Path) -> None:
    import json

    folder = save_llama(tmp_path)
    for name in ("config.json", "generation_config.json"):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | {"eos_token_id": 999}))
    assert ModelSource(str(folder)).eos_token_ids == (2,)
    content = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(content | {"eos_token": None}))
    with pytest.raises(InputError, match="no response could ever finish"):
        _ = ModelSource(str(folder)).eos_token_ids
