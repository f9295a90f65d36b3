"""A reward model's own padding token, so that every tool finds the same last token of a conversation."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_pl.distributed.gather_weights import Weights
from rlhf_pl.models.chat import eos_token_ids
from rlhf_pl.models.lora import unwrapped_name
from rlhf_pl.models.rendering import Renderer

_NEW = "<|padding|>"
_RESERVED = re.compile(r"[<\[].*(pad|reserved|unused).*[>\]]", re.IGNORECASE)
_ODD_TEXT = "\x00\ue000\U0010fffd ꙮ \U000123ab \u0f3a"  # gives the token for unknown text, if there is one


@dataclass(frozen=True)
class Padding:
    """The padding token that a model is exported with.

    Args:
        tokenizer: A copy of the model's tokenizer, with that token.
        id: The token's id.
        new_rows: Rows that are added to the embeddings for it.
    """

    tokenizer: Any
    id: int
    new_rows: int = 0


def choose_padding(render: Renderer, config: Any) -> Padding:
    """Choose a padding token that occurs in no conversation.

    It is the model's own padding token if that qualifies, else a reserved token, else a new one, in a free row of the
    embeddings if there is one.

    Args:
        render: The model's renderer, with its tokenizer.
        config: The model's config.
    """
    text_config, tokenizer = config.get_text_config(), deepcopy(render.tokenizer)
    rows: int = text_config.vocab_size
    used = _used_tokens(render, text_config)

    def is_free(token: int | None) -> bool:
        return token is not None and 0 <= token < rows and token not in used

    own = [token for token in (text_config.pad_token_id, tokenizer.pad_token_id) if is_free(token)]
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    names = {token: name for name, token in vocabulary.items()}
    reserved = [t for name, t in vocabulary.items() if _RESERVED.fullmatch(name) and is_free(t)]
    reserved.sort(key=lambda token: ("pad" not in names[token].lower(), token))
    unknown = [tokenizer.unk_token_id] if is_free(tokenizer.unk_token_id) else []
    chosen = next((token for token in (*own, *reserved) if token in names), None)
    if chosen is None and len(tokenizer) >= rows and unknown:
        chosen = unknown[0]
    if chosen is not None:
        tokenizer.pad_token = names[chosen]
        return Padding(tokenizer, chosen)
    name = next(name for name in (_NEW, *(f"<|padding_{i}|>" for i in range(len(names) + 1))) if name not in vocabulary)
    tokenizer.add_special_tokens({"pad_token": name})
    return Padding(tokenizer, tokenizer.pad_token_id, max(0, tokenizer.pad_token_id + 1 - rows))


def _used_tokens(render: Renderer, config: Any) -> set[int]:
    """Ids that occur in conversations: those of the template, BOS, EOS, and those for unknown text."""
    tokenizer = render.tokenizer
    ids = {*eos_token_ids(tokenizer, config), *tokenizer(_ODD_TEXT, add_special_tokens=False)["input_ids"]}
    ids |= {tokenizer.bos_token_id} - {None}
    return ids | set(render([{"role": "user", "content": "a"}], "b").ids)


def add_embedding_rows(weights: Weights, model: Any, count: int) -> Weights:
    """Add `count` rows of zeros to the input embeddings.

    Args:
        weights: The model's weights.
        model: The model, for the name of its embeddings.
        count: Number of rows; 0 returns the weights unchanged.
    """
    if not count:
        return weights
    table = model.get_input_embeddings()
    name = next(unwrapped_name(n) for n, module in model.named_modules() if module is table) + ".weight"

    def longer(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor.new_zeros(count, tensor.shape[1])])

    def stream() -> Iterator[tuple[str, Tensor]]:
        for key, tensor in weights.stream():
            yield key, longer(tensor) if key == name else tensor

    return Weights({k: longer(t) if k == name else t for k, t in weights.like.items()}, stream)


@contextmanager
def padding_in_config(config: Any, padding: Padding) -> Iterator[None]:
    """Context in which a model's config has the exported padding token and number of embeddings."""
    text = config.get_text_config()
    before = text.pad_token_id, text.vocab_size
    text.pad_token_id, text.vocab_size = padding.id, text.vocab_size + padding.new_rows
    try:
        yield
    finally:
        text.pad_token_id, text.vocab_size = before
