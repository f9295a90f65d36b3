"""Frozen weights in 4 bits (QLoRA, arXiv:2305.14314) by bitsandbytes, and their dequantized values."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rlhf_pl.utils.errors import InputError


def check_bitsandbytes() -> None:
    """Raise InputError if bitsandbytes is not installed."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise InputError(
            "`model.lora.base_dtype` needs the package bitsandbytes: pip install 'rlhf-pl[qlora]'."
        ) from error


def quantization_config(kind: str, compute_dtype: torch.dtype) -> Any:
    """A config for `from_pretrained` that loads all linear layers except the output head in 4 bits.

    Args:
        kind: nf4 or fp4.
        compute_dtype: Dtype of a layer's weights when they are dequantized for use.
    """
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_use_double_quant=True,
    )


def disable_repacking(model: Any) -> None:
    """Stop bitsandbytes from repacking 4-bit weights in the first forward pass without gradients.

    It repacks on CPUs with bfloat16 instructions and rounds the weights' scales to bfloat16, so that a policy's values
    would depend on its earlier use.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def is_quantized(model: Any) -> bool:
    """Whether a Hugging Face model's linear layers are in 4 bits."""
    return bool(getattr(model, "is_loaded_in_4bit", False))


def shapes(model: Any) -> dict[str, Tensor]:
    """A model's state dict with 4-bit weights as meta tensors of their dequantized shape and dtype."""
    packed = _quantized_weights(model)
    return {
        name: torch.empty(packed[name].quant_state.shape, dtype=packed[name].quant_state.dtype, device="meta")
        if name in packed
        else tensor
        for name, tensor in _state(model, packed)
    }


def dequantized_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """A model's state dict, one tensor at a time, with 4-bit weights dequantized."""
    packed = _quantized_weights(model)
    for name, tensor in _state(model, packed):
        if name in packed:
            from bitsandbytes.functional import dequantize_4bit

            tensor = dequantize_4bit(packed[name].data, packed[name].quant_state)
        yield name, tensor


def without_frozen_base(module: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A module's state dict with only its trainable parameters: the frozen base is quantized again from its folder."""
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    return {name: tensor for name, tensor in state.items() if name in trained}


def _quantized_weights(model: Any) -> dict[str, Any]:
    return {name: p for name, p in model.named_parameters() if getattr(p, "quant_state", None) is not None}


def _state(model: Any, packed: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """A model's state dict without the entries that belong to a 4-bit weight, for example its scales."""
    for name, tensor in model.state_dict().items():
        owner = name.rpartition(".weight.")[0] + ".weight"
        if owner not in packed or name == owner:
            yield name, tensor
