"""Trained models as Hugging Face folders, and checkpoints that fit them."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Protocol, runtime_checkable

import lightning as L
import torch

from rlhf_pl.errors import InputError
from rlhf_pl.lora import LoRA, save_adapter
from rlhf_pl.policy import PolicySource
from rlhf_pl.quantized import is_quantized, without_base
from rlhf_pl.strategies import is_sharded
from rlhf_pl.weights import Weights, full_tensors


@runtime_checkable
class Exportable(Protocol):
    """A module that holds a model which can be written as a Hugging Face folder."""

    def weights(self) -> Weights:
        """The model's weights under their Hugging Face names, tied ones included."""

    def export(self, folder: str, dtype: str | None = None) -> None:
        """Write the folder; to be called by all ranks."""


def export_folder(
    model: Any,
    source: PolicySource,
    weights: Weights,
    folder: str,
    dtype: str | None = None,
    write: bool = True,
    tokenizer: Any = None,
) -> None:
    """Write a model with its tokenizer and chat template: safetensors and configs.

    Sharded weights are put together in the memory of the CPU of the rank that writes.

    Args:
        model: The Hugging Face model; its config is written, with the dropout that `source` has.
        source: Where it came from.
        weights: Its weights by their Hugging Face names, tied ones included.
        folder: Where to; made if missing.
        dtype: Dtype of the weights; None for that of the model the run started from.
        write: Whether this is the rank that writes.
        tokenizer: What is written if it is not that of `source`.
    """
    target = getattr(torch, dtype) if dtype else source.config.dtype or torch.float32
    state = {}
    for name, tensor in weights.stream():
        if write:
            state[name] = tensor.detach().cpu().to(target).clone()
    if not write:
        return
    if is_quantized(model):  # the weights are written as what they stand for
        model = _without_quantization(model)
    config = model.config
    try:
        model.config = deepcopy(config)
        for key, value in vars(source.config).items():
            if "drop" in key and hasattr(config, key):
                setattr(model.config, key, value)  # ours is off
        model.config.dtype = target
        if model.can_generate():  # what is written is the source's: transformers refuses to save some that it reads
            model.generation_config = type(source.generation_config)()
        model.save_pretrained(folder, state_dict=state)
    finally:
        model.config = config
    if model.can_generate():
        source.copy_generation_config(folder)
    (tokenizer or source.tokenizer).save_pretrained(folder)


def _without_quantization(model: Any) -> Any:
    """The same architecture with plain layers, without memory."""
    config = deepcopy(model.config)
    del config.quantization_config
    with torch.device("meta"):
        return type(model)(config)


def export_adapter(module: L.LightningModule, settings: LoRA, model: Any, source: PolicySource, folder: str) -> None:
    """Write a model's adapters to `folder/adapter`, for peft; all ranks must call it, and rank 0 writes."""
    tensors = {n: t.detach().cpu().clone() for n, t in full_tensors(module, model, lambda name: ".lora_" in name)}
    if module.global_rank == 0:
        save_adapter(settings, model, tensors, source.path, f"{folder}/adapter")


def check_weights(module: L.LightningModule, checkpoint: Mapping[str, Any], source: PolicySource) -> None:
    """A checkpoint's weights must be those of this architecture. Strategies that shard take them out and check them.

    Raises:
        InputError: Names or shapes differ.
    """
    trainer = module._trainer
    if "state_dict" not in checkpoint or (trainer is not None and is_sharded(trainer)):
        return
    own, given = module.state_dict(), checkpoint["state_dict"]
    if not module.strict_loading:
        own = without_base(module, own)
    wrong = [n for n in [*own, *given] if n not in own or n not in given or own[n].shape != given[n].shape]
    if wrong:
        hint = ""
        if ".lora_" in wrong[0]:
            hint = (
                " Or adapt what the checkpoint did (--model.lora.target_modules; --model.lora.target_parameters, [] for"
                " none of the experts' weights)."
            )
        raise InputError(
            f"The checkpoint is of another model than `{source.option}` ({source.path!r}): {wrong[0]!r} and "
            f"{len(set(wrong)) - 1} more tensors do not fit. Give the run a directory of its own "
            f"(--trainer.default_root_dir DIR).{hint}"
        )


def leave_out_base(module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
    """Take a 4-bit base out of a checkpoint that is about to be written; it is quantized anew from its folder."""
    if not module.strict_loading:
        checkpoint["state_dict"] = without_base(module, checkpoint["state_dict"])
