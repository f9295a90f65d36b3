"""Small random models of a config's architecture, to check kernels and layouts on the run's device."""

import contextlib
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from rlhf_pl.models.rotary import thresholds

_VOCABULARY_SIZE = 128
WINDOW = 6  # attention windows and chunks in tokens, shorter than the sequences of the checks
_MAX_LAYERS = 8
_MAX_EXPERTS = 32  # routers choose among groups of them
_WIDTHS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size_mlp")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def small_config(config: Any, kinds: Callable[[nn.Module], list[Any]]) -> Any:
    """A config with a few layers of every kind that `config` has, and with short attention windows.

    Head size and the number of query heads per KV head do not change: kernels depend on them.

    Args:
        config: A model's config.
        kinds: Describes each layer of a model on the meta device; equal for layers of the same kind.
    """
    config = deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    text = config.get_text_config()
    for name in ("vocab_size", "vocab_size_per_layer_input"):  # the second is Gemma-3n's and Gemma-4's
        if hasattr(text, name):
            setattr(text, name, _VOCABULARY_SIZE)
    for name, token in (("pad_token_id", 0), ("bos_token_id", 1), ("eos_token_id", 2)):
        if getattr(text, name, None) is not None:
            setattr(text, name, token)
    for name in ("sliding_window", "attention_chunk_size"):
        if isinstance(getattr(text, name, None), int) and getattr(text, name) > 0:
            setattr(text, name, WINDOW)
    _lower_thresholds(text)
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(text, name, None) is not None:
            setattr(text, name, 2.0)  # low enough to change a small model's logits
    _keep_layers(text, config, kinds)
    return config


def _lower_thresholds(text: Any) -> None:
    """Make rotary factors that depend on length change after a few positions."""
    limits = thresholds(text)
    if "dynamic" in limits:
        text.max_position_embeddings = WINDOW
    if "longrope" in limits:
        if getattr(text, "original_max_position_embeddings", None):
            text.original_max_position_embeddings = WINDOW
        parameters = text.rope_parameters
        for part in (parameters, *parameters.values()):
            if isinstance(part, dict) and part.get("rope_type") == "longrope":
                part["original_max_position_embeddings"] = WINDOW


def narrow(config: Any) -> Any:
    """A config with fewer heads, narrower layers and fewer experts, if it has the usual names for them."""
    config = deepcopy(config)
    text = config.get_text_config()
    with contextlib.suppress(AttributeError, TypeError, ValueError, RuntimeError):  # heads of several sizes (Gemma-4)
        _reduce_heads(text)
    for name in _WIDTHS:
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, 128)
    for name in _EXPERTS:
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, min(getattr(text, name), _MAX_EXPERTS))
    return config


def _reduce_heads(text: Any) -> None:
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    few = min(kv_heads, 2)
    text.num_attention_heads = few * (heads // kv_heads)
    if getattr(text, "num_key_value_heads", None) is not None:
        text.num_key_value_heads = few
    text.hidden_size = min(text.hidden_size, size * text.num_attention_heads)
    if isinstance(getattr(text, "mamba_d_head", None), int):  # hybrids, whose heads fill the expanded width
        text.mamba_n_heads = int(text.mamba_expand * text.hidden_size) // text.mamba_d_head


def _keep_layers(text: Any, config: Any, kinds: Callable[[nn.Module], list[Any]]) -> None:
    """Keep the first layers of a config, up to the first that completes one of each kind."""
    from transformers import AutoModel

    count = text.num_hidden_layers
    with torch.device("meta"):
        found = kinds(AutoModel.from_config(config))
    types = list(getattr(text, "layer_types", None) or [None] * len(found))
    found = list(zip(found, types, strict=False))
    needed = next((n for n in range(1, len(found)) if set(found[:n]) == set(found)), len(found)) if found else 1
    keep = max(1, min(needed, _MAX_LAYERS))
    if needed > keep and getattr(text, "layer_types", None):  # the kinds are far apart: keep one layer of each
        types = list(dict.fromkeys(types))
        keep = len(types)
    for name, value in list(vars(text).items()):
        if isinstance(value, list | tuple) and len(value) == count:
            setattr(text, name, list((types if name == "layer_types" else value)[:keep]))
        elif isinstance(value, dict) and value and all(isinstance(key, int) for key in value):
            setattr(text, name, {key: part for key, part in value.items() if key < keep})
    text.num_hidden_layers = keep


@torch.no_grad()
def make_peaked(model: nn.Module) -> None:
    """Set random weights for which attention is far from uniform and every parameter matters, biases and norms too."""
    random = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=random).to(parameter.device, parameter.dtype)
        if parameter.dim() < 2:
            parameter.add_(0.1 * noise)
        else:
            parameter.copy_(noise * 1.5 * parameter.shape[-1] ** -0.5)
