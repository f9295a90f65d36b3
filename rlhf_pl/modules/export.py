"""Trained models as Hugging Face folders, and checkpoints that fit them."""

import re
import tempfile
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any, Protocol, runtime_checkable

import lightning as L
import torch

from rlhf_pl.distributed.gather_weights import Weights, full_tensors
from rlhf_pl.distributed.strategies import is_sharded
from rlhf_pl.models.lora import LoRA, adapted_targets, adapter_targets, save_adapter
from rlhf_pl.models.policy import RESCALING
from rlhf_pl.models.pretrained_files import WeightFiles
from rlhf_pl.models.quantization import without_frozen_base
from rlhf_pl.models.source import ModelSource
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.finite import first_not_finite

# of models that also see pictures or hear; servers want them even for text
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


@runtime_checkable
class Exportable(Protocol):
    """A module that holds a model which can be written as a Hugging Face folder."""

    def weights(self) -> Weights:
        """The model's weights under their Hugging Face names, tied ones included."""

    def export(self, folder: str, dtype: str | None = None) -> None:
        """Write the folder; to be called by all ranks."""


def export_folder(
    model: Any,
    source: ModelSource,
    tokenizer: Any,
    weights: Weights,
    folder: str,
    dtype: str | None = None,
    write: bool = True,
) -> None:
    """Write a model with its tokenizer and chat template: what `save_pretrained` writes of it in that dtype.

    Sharded weights are put together in the memory of the CPU of the rank that writes.

    Args:
        model: The Hugging Face model; its config is written, with the dropout that `source` has.
        source: Where it came from.
        tokenizer: Its own.
        weights: Its weights by their Hugging Face names, tied ones included.
        folder: Where to; made if missing.
        dtype: Dtype of the weights; None for that of the checkpoint that the run started from.
        write: Whether this is the rank that writes.
    """
    target = export_dtype(source, dtype)
    if not write:
        for _ in weights.stream():
            pass
        return
    twin = _twin(model, source, target)
    dtype_of = _dtypes(twin, target)
    state = {n: t.detach().to("cpu", dtype_of(n, t), copy=True) for n, t in weights.stream()}
    if name := first_not_finite(state.items()):
        raise InputError(
            f"`{name}` holds numbers that {str(target).removeprefix('torch.')} can't. Nothing is exported. Set "
            "--export.dtype float32 (or bfloat16), and look whether the training has diverged."
        )
    _tie(state, twin)
    _save(twin, source, tokenizer, state, folder)


def try_export(model: Any, source: ModelSource, tokenizer: Any, dtype: str | None = None) -> None:
    """Write all of an export but weights, into a folder that goes at once, so that nothing fails after the training.

    Args:
        model: Of the kind that will be exported; without memory behind its weights.
        source: And the others: see `export_folder`.
        tokenizer: See there.
        dtype: See there.

    Raises:
        InputError: Says what can't be written.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            _save(_twin(model, source, export_dtype(source, dtype)), source, tokenizer, {}, folder)
    except InputError:  # which says itself what is wrong
        raise
    except Exception as error:  # whatever configs, tokenizers and code that comes with models may raise
        line = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        raise InputError(
            f"`{source.option}`: {source.path!r} could not be exported after the training: {line}. Repair that file of "
            "the model, or choose another one."
        ) from error


def export_dtype(source: ModelSource, dtype: str | None = None) -> torch.dtype:
    """The dtype of exported weights: `dtype`, or that of the checkpoint's tensors, whatever its config says."""
    if dtype is not None:
        return getattr(torch, dtype)
    said = source.config.dtype or source.config.get_text_config().dtype or torch.float32
    said = getattr(torch, said) if isinstance(said, str) else said
    quantized = getattr(source.config, "quantization_config", None) is not None
    return said if quantized else WeightFiles(source).dtype or said


def _twin(model: Any, source: ModelSource, dtype: torch.dtype) -> Any:
    """The same architecture in the dtype that is exported, without memory: what transformers takes config and names of.

    Quantized layers are plain ones in it: their weights are written as what they stand for.
    """
    config = deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    _restore_dropout(config, source.config)
    with torch.device("meta"):
        twin = type(model)._from_config(config, dtype=dtype)
    if (conversions := getattr(model, "_weight_conversions", None)) is not None:
        twin._weight_conversions = conversions  # as it was loaded
    return twin


def _restore_dropout(config: Any, source: Any) -> None:
    """Ours is off."""
    for key, value in vars(source).items():
        if ("drop" in key or key == RESCALING) and hasattr(config, key):
            setattr(config, key, value)
    for key in getattr(source, "sub_configs", {}):
        if getattr(source, key, None) is not None and getattr(config, key, None) is not None:
            _restore_dropout(getattr(config, key), getattr(source, key))


def _dtypes(twin: Any, dtype: torch.dtype) -> Callable[[str, torch.Tensor], torch.dtype]:
    """(name, tensor) -> its dtype in a model that transformers has loaded in `dtype`: some keep float32."""
    kept = [re.compile(pattern.replace("*", ".*")) for pattern in twin._get_dtype_plan(dtype)]
    own = {name: parameter.dtype for name, parameter in twin.named_parameters()}

    def dtype_of(name: str, tensor: torch.Tensor) -> torch.dtype:
        if not tensor.is_floating_point():
            return tensor.dtype
        if any(pattern.search(name) for pattern in kept):
            return torch.float32
        return own.get(name, dtype)

    return dtype_of


def _tie(state: dict[str, torch.Tensor], twin: Any) -> None:
    """Let tied tensors be one, of which transformers writes the first name; those that have come apart stay two."""
    for name, other in twin.all_tied_weights_keys.items():
        if name in state and other in state and torch.equal(state[name], state[other]):
            state[name] = state[other]


def _save(twin: Any, source: ModelSource, tokenizer: Any, state: dict[str, torch.Tensor], folder: str) -> None:
    if twin.can_generate():  # what is written is the source's: transformers refuses to save some that it reads
        twin.generation_config = type(source.generation_config)()
    twin.save_pretrained(folder, state_dict=state)
    if twin.can_generate():
        source.copy_generation_config(folder)
    tokenizer.save_pretrained(folder)
    if type(twin).__name__ in (source.config.architectures or ()):
        source.copy_files(PROCESSOR_FILES, folder)


def export_adapter(module: L.LightningModule, settings: LoRA, model: Any, source: ModelSource, folder: str) -> None:
    """Write a model's adapters to `folder/adapter`, for peft; all ranks must call it, and rank 0 writes."""
    tensors = {n: t.detach().cpu().clone() for n, t in full_tensors(module, model, lambda name: ".lora_" in name)}
    if module.global_rank == 0:
        save_adapter(settings, adapted_targets(model), model, tensors, source.path, f"{folder}/adapter")


def try_adapter(model: Any, settings: LoRA, source: ModelSource) -> None:
    """See whether `export_adapter` will be able to write; `model` is without memory and without adapters."""
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(settings, adapter_targets(model, settings), model, {}, source.path, folder)


def check_weights(module: L.LightningModule, checkpoint: Mapping[str, Any], source: ModelSource) -> None:
    """A checkpoint's weights must be those of this architecture. Strategies that shard take them out and check them.

    Raises:
        InputError: Names or shapes differ.
    """
    trainer = module._trainer
    if "state_dict" not in checkpoint or (trainer is not None and is_sharded(trainer)):
        return
    own, given = module.state_dict(), checkpoint["state_dict"]
    if not module.strict_loading:
        own = without_frozen_base(module, own)
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
        checkpoint["state_dict"] = without_frozen_base(module, checkpoint["state_dict"])
