"""A task that a CPU learns in seconds: a tiny random model, and a reward that counts vowels."""

import itertools
import json
import random
from pathlib import Path

TOKENS = 16  # length of a response
LETTERS = "aeioubcdfghjklmnpqrstvwxyz"


def score(response: str) -> float:
    """Vowels per token; 3 at most, for tokens that are three vowels each: few of them are found at first."""
    return sum(letter in "aeiou" for letter in response) / TOKENS


def save_toy_model(folder: Path, seed: int = 0) -> None:
    """Save a random Llama of 0.2 M parameters, whose 400 tokens are words of one to three letters."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["".join(letters) for size in (1, 2, 3) for letters in itertools.product(LETTERS, repeat=size)]
    chosen = list(LETTERS) + random.Random(seed).sample(words[len(LETTERS) :], 400 - len(LETTERS) - 4)
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "?", *chosen])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        chat_template="{{ bos_token }} {% for m in messages %}{{ m['content'] }} {% endfor %}?",
    ).save_pretrained(folder)


def save_prompts(file: Path, count: int = 160) -> None:
    """Save prompts of three words each."""
    source = random.Random(0)
    rows = [{"prompt_id": str(i), "prompt": " ".join(source.choices(LETTERS, k=3))} for i in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
