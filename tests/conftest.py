"""Small random models, created by the tests: nothing is downloaded."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch starts: runs that are compared bit by bit need one number

import pytest
import torch

from rlhf_pl.models.source import ModelSource

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXTS = [
    "What is the capital of France? The capital of France is Paris.",
    "Name three colours: red, green and blue.",
    "How many legs do two dogs have? Two dogs have eight legs.",
    "Tell me about the sea, the sky and the hills beyond the river.",
]


def make_tokenizer() -> Any:
    """A byte-level BPE with a chat template, a BOS that the tokenizer itself would also add, and two EOS tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|end|>", pad_token="</s>", chat_template=CHAT_TEMPLATE
    )


def _sizes(tokenizer: Any) -> dict[str, int]:
    """Sizes of a small Llama."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,  # heads of 32, the smallest that vLLM supports on the CPU
        "num_key_value_heads": 1,
    }


def save_llama(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Save a random Llama of 100,000 parameters with the tokenizer of `make_tokenizer`; ids 1 and 2 are EOS."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    settings = (
        _sizes(tokenizer)
        | {
            "max_position_embeddings": 256,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "initializer_range": 0.2,
        }
        | changes
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**settings))
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=[1, 2])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the longest tests first, so that the workers finish at the same time."""

    def expected_minutes(item: pytest.Item) -> float:
        marker = item.get_closest_marker("slow")
        return marker.kwargs.get("minutes", 0) if marker else 0

    items.sort(key=expected_minutes, reverse=True)


@pytest.fixture(autouse=True)
def quiet_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run prints does not depend on the load of the machine."""
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def source(llama: Path) -> ModelSource:
    return ModelSource(str(llama))


@pytest.fixture(scope="session")
def servers(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """URLs of two `vllm serve` that accept weights; their start is slow, so their tests share an xdist group."""
    from tests.vllm_serving import sampling_server

    folder = tmp_path_factory.mktemp("servers")
    with ExitStack() as stack:
        yield [stack.enter_context(sampling_server(llama, folder / f"{i}.log")) for i in range(2)]


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., str]:
    import json

    def write(rows: list[Any], name: str = "prompts.jsonl") -> str:
        file = tmp_path / name
        file.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
        return str(file)

    return write


def save_reward_model(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Save a random Llama classifier with one output, and the tokenizer of `make_tokenizer`."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = make_tokenizer()
    settings = (
        _sizes(tokenizer)
        | {
            "max_position_embeddings": 512,
            "initializer_range": 0.2,
            "num_labels": 1,
            "pad_token_id": 1,
        }
        | changes
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForSequenceClassification(LlamaConfig(**settings))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reward_model(tmp_path_factory.mktemp("models") / "reward")
