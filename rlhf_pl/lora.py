"""LoRA adapters (arXiv:2106.09685) by peft, put into a model in place."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_pl.errors import InputError


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters on every linear layer but the output head.

    Args:
        rank: Rank of the update.
        alpha: The update is scaled by alpha / rank.
        dropout: Dropout in front of the adapters.
        target_modules: Names of the layers, such as `[q_proj, v_proj]`; null for every linear layer of the backbone.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: list[str] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"`model.lora.rank` must be 1 or more, got {self.rank}.")
        if not 0 <= self.dropout < 1:
            raise InputError(f"`model.lora.dropout` must be from 0 to below 1, got {self.dropout}.")


def check_lora(settings: LoRA | None) -> None:
    """Raise InputError where adapters are wanted and peft is not installed."""
    if settings is not None:
        _peft()


def add_lora(model: Any, settings: LoRA, seed: int, train_head: bool) -> None:
    """Freeze a Hugging Face model and put trainable adapters into its backbone.

    Args:
        model: Changed in place.
        settings: The adapters.
        seed: Of their initial values.
        train_head: Whether what stands on the backbone trains as a whole.
    """
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer

    peft = _peft()
    model.requires_grad_(False)
    prefix = model.base_model_prefix + "."
    kinds = (torch.nn.Linear, Conv1D)
    linear = [n for n, m in model.named_modules() if isinstance(m, kinds) and n.startswith(prefix)]
    wanted = settings.target_modules
    if wanted is not None:
        linear = [n for n in linear if n.split(".")[-1] in wanted]
    if not linear:
        raise InputError(f"`model.lora.target_modules`: no linear layer of {type(model).__name__} is called {wanted}.")
    config = peft.LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=linear
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, model)
    if train_head:
        for name, parameter in model.named_parameters():
            if not name.startswith(prefix):
                parameter.requires_grad_(True)


def merged_state_dict(model: Any) -> dict[str, Tensor]:
    """The model's weights with adapters merged in, in copies, under the names they have without adapters."""
    merged = {}
    for name, tensor in model.state_dict().items():
        if ".lora_" in name:
            continue
        if ".base_layer." in name:
            layer = model.get_submodule(name.partition(".base_layer.")[0])
            if name.endswith(".base_layer.weight"):
                delta = sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters)
                tensor = (tensor.float() + delta.float()).to(tensor.dtype)
        merged[name.replace(".base_layer.", ".")] = tensor
    return merged


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise InputError("`model.lora` needs the package peft: pip install 'rlhf-pl[lora]'.") from error
    return peft
