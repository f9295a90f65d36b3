"""Supervised fine-tuning: learned tokens, packing and perplexity."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from rlhf_pl import SFTDataModule, SFTModule
from rlhf_pl.callbacks import EpochRun, HFExport
from rlhf_pl.data.packing import Example, fill_rows, pack_examples
from rlhf_pl.models.chat import encode_conversation
from rlhf_pl.models.policy import PolicyLM
from rlhf_pl.models.shared_prefix import share_prompts
from rlhf_pl.optim import AdamW
from rlhf_pl.utils.errors import InputError
from tests import chat_templates
from tests.conftest import make_tokenizer

Write = Callable[..., str]
TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello there"},
    {"role": "user", "content": "Name a colour"},
    {"role": "assistant", "content": "Red"},
]
ROWS = [{"prompt": f"Say {i}", "response": f"I say {i}, of course."} for i in range(24)]


@pytest.mark.parametrize(("every", "learned"), [(True, ["Hello there<|end|>", "Red<|end|>"]), (False, ["Red<|end|>"])])
def test_only_responses_are_learned_with_their_eos(every: bool, learned: list[str]) -> None:
    tokenizer = make_tokenizer()
    ids, mask = encode_conversation(tokenizer, TALK, [1, 2], every)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(TALK, tokenize=False)
    assert tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m]) == "".join(learned)


@pytest.mark.parametrize("untrained", [[], [1], [2], [0, 3]])
def test_whole_conversations_are_learned_except_messages_of_weight_0(untrained: list[int]) -> None:
    tokenizer = make_tokenizer()
    talk = [{**m, "weight": 0} if i in untrained else m for i, m in enumerate(TALK)]
    ids, mask = encode_conversation(tokenizer, talk, [1, 2], whole=True)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(TALK, tokenize=False)
    learned = tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])
    for number, message in enumerate(TALK):
        assert (message["content"] in learned) == (number not in untrained)
    assert all(mask) == (not untrained)


ZEPHYR = (
    "{% for m in messages %}\n{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token }}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)


@pytest.mark.parametrize("name", ["LLAMA", "QWEN", "GEMMA", "THINKING", "ZEPHYR"])
def test_a_whole_conversation_is_its_templates_text_with_the_prompt_as_in_generation(name: str) -> None:
    """Also where earlier responses are written without their thinking (THINKING)."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = ZEPHYR if name == "ZEPHYR" else getattr(chat_templates, name)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>", "<|eot_id|>", "<end_of_turn>"]})
    eos = tokenizer.convert_tokens_to_ids(["<|end|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>"])
    ids, mask = encode_conversation(tokenizer, TALK, eos, whole=True)
    assert all(mask)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(TALK, tokenize=False)
    asked = tokenizer.apply_chat_template(TALK[:-1], tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(asked, add_special_tokens=False)["input_ids"]
    thinking = "<think>\n\n</think>\n\n" if name == "THINKING" else ""
    assert tokenizer.decode(ids[len(prompt) :]).strip() in {f"{thinking}Red{tokenizer.decode(end)}" for end in eos}


def test_templates_that_rewrite_earlier_turns_or_write_no_eos_are_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] if loop.last else m['content'] | upper }}<|end|>"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    with pytest.raises(InputError, match="loss_on: last"):
        encode_conversation(tokenizer, TALK, [2])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    with pytest.raises(InputError, match="writes no EOS"):
        encode_conversation(tokenizer, TALK[:2], [2])


def test_packing_fills_rows_and_keeps_every_example() -> None:
    lengths = [5, 4, 3, 3, 2, 9]
    rows = fill_rows([0, 1, 2, 3, 4, 5], lengths, 9)
    assert rows == [[0, 1], [2, 3, 4], [5]]
    assert all(sum(lengths[i] for i in row) <= 9 for row in rows)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt_neox"])
def test_packed_examples_give_the_results_of_separate_ones(kind: str) -> None:
    """Log-probs and gradient in three architectures, with examples in separate rows and concatenated."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(1)
    config = AutoConfig.for_model(kind, vocab_size=50, initializer_range=0.3, num_key_value_heads=2, **sizes)
    lm = AutoModelForCausalLM.from_config(config).eval()
    policy = PolicyLM(lm)
    examples = [
        Example([1, 2, 3, 4, 5], [False, False, True, True, True]),
        Example([6, 7, 8], [False, True, True]),
        Example([9, 4, 4, 2], [True, False, False, True]),
    ]
    found = []
    for share in (False, True):
        if share:
            assert share_prompts(lm)
        logps = policy(**pack_examples(examples).inputs())
        policy.zero_grad()
        logps.sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
        found.append((logps, gradient.clone()))
    assert len(found[0][0]) == 6
    assert torch.allclose(found[0][0], found[1][0], atol=1e-5)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-5)


def fit(folder: Path, llama: Path, file: str, data: dict[str, Any] | None = None, **options: Any) -> dict[str, float]:
    L.seed_everything(3, verbose=False)
    trainer = L.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[EpochRun(), HFExport(dtype="float32")],
        enable_checkpointing=False,
        **{"max_epochs": 1} | options,
    )
    settings = {"max_tokens": 64, "batch_size": 2, "val_conversations": 6} | (data or {})
    module = SFTModule(str(llama), optimizer=lambda p: AdamW(p, lr=3e-3))
    trainer.fit(module, datamodule=SFTDataModule(file, **settings))
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_perplexity_falls_and_equals_an_independent_one(llama: Path, tmp_path: Path, write_jsonl: Write) -> None:
    """The loss of transformers with labels of -100 except on responses."""
    from transformers import AutoModelForCausalLM

    file = write_jsonl(ROWS)
    first = fit(tmp_path / "one", llama, file)
    later = fit(tmp_path / "five", llama, file, max_epochs=5)
    assert later["val/perplexity"] < first["val/perplexity"] < 50
    held_out = SFTDataModule(file, max_tokens=64, val_conversations=6)
    held_out.trainer = L.Trainer(logger=False, accelerator="cpu")
    held_out.trainer.strategy._lightning_module = SFTModule(str(llama))
    held_out.setup("fit")
    assert held_out.val_set is not None
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "five" / "model").eval()
    total = count = 0.0
    for example in held_out.val_set.examples:
        ids = torch.tensor([list(example.ids)])
        labels = torch.where(torch.tensor([list(example.mask)]), ids, -100)
        with torch.no_grad():
            total += model(input_ids=ids, labels=labels).loss.item() * sum(example.mask)
        count += sum(example.mask)
    assert later["val/perplexity"] == pytest.approx(math.exp(total / count), rel=1e-3)


def test_packing_and_micro_batches_do_not_change_an_update(llama: Path, tmp_path: Path, write_jsonl: Write) -> None:
    """One update over all rows: its loss is the mean over response tokens, however they are packed."""
    from safetensors.torch import load_file

    file = write_jsonl([r | {"response": r["response"] * (1 + i % 3)} for i, r in enumerate(ROWS)])
    weights = []
    for i, (packing, size, accumulate) in enumerate([(False, 18, 1), (False, 3, 6), (True, 1, 100)]):
        data = {"packing": packing, "batch_size": size, "max_tokens": 128}
        fit(tmp_path / str(i), llama, file, data, accumulate_grad_batches=accumulate)
        weights.append(load_file(tmp_path / str(i) / "model" / "model.safetensors"))
    for other in weights[1:]:
        for name, tensor in weights[0].items():
            assert torch.allclose(tensor, other[name], atol=2e-4), name


def test_wrong_inputs(llama: Path, tmp_path: Path, write_jsonl: Write) -> None:
    for rows, message in (
        ([{"prompt": "Hi"}], r"no column `messages`, or `prompt` and `response`; found prompt"),
        ([{"prompt": "Hi", "response": ""}], r"line 1: `response`: the response is empty"),
        ([{"messages": TALK[:1]}], r"does not end with an assistant message"),
        ([{"prompt": "Hi", "response": "long " * 200}], r"all are longer than max_tokens=64"),
    ):
        with pytest.raises(InputError, match=message):
            fit(tmp_path, llama, write_jsonl(rows), {"val_conversations": 0})
    with pytest.raises(InputError, match=r"`data.max_tokens` of 10000 exceeds the context"):
        fit(tmp_path, llama, write_jsonl(ROWS), {"max_tokens": 10_000})
