"""Writes trained models as Hugging Face folders, and checks that checkpoints fit their models."""

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
from rlhf_pl.models.rounding import round_to
from rlhf_pl.models.source import ModelSource
from rlhf_pl.utils.errors import InputError, first_line
from rlhf_pl.utils.finite import find_first_nonfinite

# of models that also take images or audio; servers need them even for text
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


@runtime_checkable
class Exportable(Protocol):
    """A module whose model can be written as a Hugging Face folder."""

    def weights(self) -> Weights:
        """The model's weights under their Hugging Face names, tied ones included."""

    def export(self, folder: str, dtype: str | None = None) -> None:
        """Write the folder; all ranks call it together."""


def export_folder(
    model: Any,
    source: ModelSource,
    tokenizer: Any,
    weights: Weights,
    folder: str,
    dtype: str | None = None,
    write: bool = True,
) -> None:
    """Write a model with its tokenizer and chat template, as `save_pretrained` writes a model of that dtype.

    bfloat16 weights are rounded by `round_to`, so that updates below its resolution are not lost.

    Sharded weights are gathered in CPU memory of the rank that writes.

    Args:
        model: The Hugging Face model; its config is written, with the dropout of `source`.
        source: Where the model came from.
        tokenizer: The model's tokenizer.
        weights: The model's weights by their Hugging Face names, tied ones included.
        folder: The target; made if missing.
        dtype: Dtype of the weights; None for that of the checkpoint that the run started from.
        write: Whether this is the rank that writes.
    """
    target = export_dtype(source, dtype)
    if not write:
        for _ in weights.stream():
            pass
        return
    meta_copy = _make_meta_copy(model, source, target)
    dtype_of = _dtypes(meta_copy, target)
    state = {n: round_to(t.detach(), dtype_of(n, t)).to("cpu", copy=True) for n, t in weights.stream()}
    if name := find_first_nonfinite(state.items()):
        raise InputError(
            f"`{name}` holds numbers that {str(target).removeprefix('torch.')} can't represent. Nothing is exported. "
            "Set --export.dtype float32 (or bfloat16), and check whether the training has diverged."
        )
    _tie(state, meta_copy)
    _save(meta_copy, source, tokenizer, state, folder)


def try_export(model: Any, source: ModelSource, tokenizer: Any, dtype: str | None = None) -> None:
    """Write an export without weights into a temporary folder, so that no export fails after the training.

    Args:
        model: The model to export; may be on the meta device.
        source: Where the model came from.
        tokenizer: The model's tokenizer.
        dtype: Dtype of the weights, as in `export_folder`.

    Raises:
        InputError: The export can't be written.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            _save(_make_meta_copy(model, source, export_dtype(source, dtype)), source, tokenizer, {}, folder)
    except InputError:  # its message is complete
        raise
    except Exception as error:  # configs, tokenizers and code that comes with models may raise anything
        line = first_line(error)
        raise InputError(
            f"`{source.option}`: {source.path!r} could not be exported after the training: {line}. Repair that file of "
            "the model, or choose another one."
        ) from error


def export_dtype(source: ModelSource, dtype: str | None = None) -> torch.dtype:
    """The dtype of exported weights: `dtype`, or that of the checkpoint's tensors, whatever its config says."""
    if dtype is not None:
        return getattr(torch, dtype)
    declared = source.config.dtype or source.config.get_text_config().dtype or torch.float32
    declared = getattr(torch, declared) if isinstance(declared, str) else declared
    is_quantized = getattr(source.config, "quantization_config", None) is not None
    return declared if is_quantized else WeightFiles(source).dtype or declared


def _make_meta_copy(model: Any, source: ModelSource, dtype: torch.dtype) -> Any:
    """Make the same architecture in the exported dtype on the meta device; transformers reads config and names from it.

    Quantized layers are plain ones in it, because their weights are exported dequantized.
    """
    config = deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    _restore_dropout(config, source.config)
    with torch.device("meta"):
        meta_copy = type(model)._from_config(config, dtype=dtype)
    if (conversions := getattr(model, "_weight_conversions", None)) is not None:
        meta_copy._weight_conversions = conversions  # those that it was loaded with
    return meta_copy


def _restore_dropout(config: Any, source: Any) -> None:
    """Set the source's dropout again, which training turns off."""
    for key, value in vars(source).items():
        if ("drop" in key or key == RESCALING) and hasattr(config, key):
            setattr(config, key, value)
    for key in getattr(source, "sub_configs", {}):
        if getattr(source, key, None) is not None and getattr(config, key, None) is not None:
            _restore_dropout(getattr(config, key), getattr(source, key))


def _dtypes(meta_copy: Any, dtype: torch.dtype) -> Callable[[str, torch.Tensor], torch.dtype]:
    """Function (name, tensor) -> its dtype in a model that transformers has loaded in `dtype`; some keep float32."""
    kept = [re.compile(pattern.replace("*", ".*")) for pattern in meta_copy._get_dtype_plan(dtype)]
    own = {name: parameter.dtype for name, parameter in meta_copy.named_parameters()}

    def dtype_of(name: str, tensor: torch.Tensor) -> torch.dtype:
        if not tensor.is_floating_point():
            return tensor.dtype
        if any(pattern.search(name) for pattern in kept):
            return torch.float32
        return own.get(name, dtype)

    return dtype_of


def _tie(state: dict[str, torch.Tensor], meta_copy: Any) -> None:
    """Make tied tensors one object, so that transformers writes them once; those that now differ stay separate."""
    for name, other in meta_copy.all_tied_weights_keys.items():
        if name in state and other in state and torch.equal(state[name], state[other]):
            state[name] = state[other]


def _save(meta_copy: Any, source: ModelSource, tokenizer: Any, state: dict[str, torch.Tensor], folder: str) -> None:
    if meta_copy.can_generate():  # the source's is copied below: transformers refuses to save some that it reads
        meta_copy.generation_config = type(source.generation_config)()
    meta_copy.save_pretrained(folder, state_dict=state)
    if meta_copy.can_generate():
        source.copy_generation_config(folder)
    tokenizer.save_pretrained(folder)
    if type(meta_copy).__name__ in (source.config.architectures or ()):
        source.copy_files(PROCESSOR_FILES, folder)


def export_adapter(module: L.LightningModule, settings: LoRA, model: Any, source: ModelSource, folder: str) -> None:
    """Write a model's adapters to `folder/adapter`, for peft; all ranks must call it, and rank 0 writes."""
    tensors = {n: t.detach().cpu().clone() for n, t in full_tensors(module, model, lambda name: ".lora_" in name)}
    if module.global_rank == 0:
        save_adapter(settings, adapted_targets(model), model, tensors, source.path, f"{folder}/adapter")


def try_adapter(model: Any, settings: LoRA, source: ModelSource) -> None:
    """Check that `export_adapter` will be able to write; `model` is on the meta device and has no adapters."""
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(settings, adapter_targets(model, settings), model, {}, source.path, folder)


def check_weights(module: L.LightningModule, checkpoint: Mapping[str, Any], source: ModelSource) -> None:
    """Check that a checkpoint's weights fit the model. Sharding strategies take them out and check them themselves.

    Raises:
        InputError: Names or shapes differ.
    """
    trainer = module._trainer
    if "state_dict" not in checkpoint or (trainer is not None and is_sharded(trainer)):
        return
    own, loaded = module.state_dict(), checkpoint["state_dict"]
    if not module.strict_loading:
        own = without_frozen_base(module, own)
    wrong = [n for n in [*own, *loaded] if n not in own or n not in loaded or own[n].shape != loaded[n].shape]
    if wrong:
        names = sorted(set(wrong), key=wrong.index)
        more = f" and {len(names) - 1} more tensors do" if len(names) > 1 else " does"
        fault = f"{names[0]!r}{more} not fit. Give the run its own directory (--trainer.default_root_dir DIR)."
        if all(name.startswith("critic.") or ".value_head." in name for name in names):
            raise InputError(
                f"The checkpoint is of another critic than `model.critic` gives: {fault} Or leave its `model`, "
                "`shares_trunk` and `lora` as they were."
            )
        hint = ""
        if ".lora_" in wrong[0]:
            hint = (
                " Or adapt the same weights as the checkpoint (--model.lora.target_modules; "
                "--model.lora.target_parameters, [] for none of the experts' weights)."
            )
        raise InputError(f"The checkpoint is of another model than `{source.option}` ({source.path!r}): {fault}{hint}")


def leave_out_base(module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
    """Remove a 4-bit base from a checkpoint before it is written; a resumed run quantizes it again from its folder."""
    if not module.strict_loading:
        checkpoint["state_dict"] = without_frozen_base(module, checkpoint["state_dict"])
