"""Trained models as Hugging Face folders, and checkpoints that fit them."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from rlhf_pl.errors import InputError
from rlhf_pl.policy import PolicySource


@runtime_checkable
class Exportable(Protocol):
    """A module that holds a model which can be written as a Hugging Face folder."""

    def hf_state_dict(self) -> Mapping[str, Tensor]:
        """The model's weights under their Hugging Face names, tied ones included."""

    def export(self, folder: str, dtype: str | None = None) -> None:
        """Write the folder."""


def export_folder(
    model: Any, source: PolicySource, weights: Mapping[str, Tensor], folder: str, dtype: str | None = None
) -> None:
    """Write a model with its tokenizer and chat template: safetensors and configs.

    Args:
        model: The Hugging Face model; its config is written, with the dropout that `source` has.
        source: Where it came from.
        weights: Its weights by their Hugging Face names, tied ones included.
        folder: Where to; made if missing.
        dtype: Dtype of the weights; None for that of the model the run started from.
    """
    target = getattr(torch, dtype) if dtype else source.config.dtype or torch.float32
    state = {name: tensor.detach().cpu().to(target).clone() for name, tensor in weights.items()}
    config = model.config
    try:
        model.config = deepcopy(config)
        for key, value in vars(source.config).items():
            if "drop" in key and hasattr(config, key):
                setattr(model.config, key, value)  # ours is off
        model.config.dtype = target
        if model.can_generate():
            model.generation_config = source.generation_config
        model.save_pretrained(folder, state_dict=state)
    finally:
        model.config = config
    source.tokenizer.save_pretrained(folder)


def check_weights(module: nn.Module, weights: Mapping[str, Tensor], source: PolicySource) -> None:
    """A checkpoint's weights must be those of this architecture.

    Raises:
        InputError: Names or shapes differ.
    """
    own, given = module.state_dict(), weights
    wrong = [n for n in [*own, *given] if n not in own or n not in given or own[n].shape != given[n].shape]
    if wrong:
        raise InputError(
            f"The checkpoint is of another model than `{source.option}` ({source.path!r}): {wrong[0]!r} and "
            f"{len(set(wrong)) - 1} more tensors do not fit. Give the run a directory of its own "
            "(--trainer.default_root_dir DIR)."
        )
