"""Gathers a model's weights under their Hugging Face names, one tensor at a time, under any strategy."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn

from rlhf_pl.models.lora import merged_tensors, plain_name, unwrapped_name
from rlhf_pl.models.quantization import dequantized_tensors, is_quantized, shapes


@dataclass(frozen=True)
class Weights:
    """The weights of a model, tied ones included, as a stream.

    Sharded tensors are gathered from all ranks while the stream is read, so all ranks must read it together, to its
    end. A rank holds one unit at a time (a decoder layer, or embeddings and head).

    Args:
        like: Names, shapes and dtypes: tensors on the meta device.
        stream: Returns an iterator of (name, full tensor).
    """

    like: Mapping[str, Tensor]
    stream: Callable[[], Iterator[tuple[str, Tensor]]]


def weights_of(state: Mapping[str, Tensor]) -> Weights:
    """`Weights` of full tensors."""
    return Weights(_like(state), lambda: iter(state.items()))


def model_weights(module: L.LightningModule, model: Any, like: Mapping[str, Tensor]) -> Weights:
    """`Weights` of a Hugging Face model inside a module; adapters are merged into copies.

    Args:
        module: Its Trainer may have sharded the model.
        model: Part of the module.
        like: `like_of(model)`, taken before it was sharded.
    """
    return Weights(like, lambda: merged_tensors(model, lambda names: full_tensors(module, model, names)))


def like_of(model: Any) -> dict[str, Tensor]:
    """Names, shapes and dtypes of a model's weights without adapters, on the meta device."""
    state = shapes(model) if is_quantized(model) else model.state_dict()
    return _like({plain_name(name): t for name, t in state.items() if ".lora_" not in name})


def _like(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in state.items()}


def full_tensors(
    module: L.LightningModule, model: nn.Module, wanted: Callable[[str], bool]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the wanted tensors of a model inside a module, unsharded. Under FSDP all ranks must iterate together."""
    trainer = module._trainer
    if trainer is not None and isinstance(trainer.strategy, FSDPStrategy) and trainer.model is not module:
        root: Any = trainer.model
        if any(part is model for part in root.modules()):
            yield from _summoned(root, model, wanted)
            return
    tensors: Any = dequantized_tensors(model) if is_quantized(model) else model.state_dict().items()
    for name, tensor in tensors:
        if wanted(name):
            if hasattr(tensor, "full_tensor"):  # FSDP2
                device = module.device if tensor.device.type == "cpu" else tensor.device  # offloaded shards
                tensor = tensor.to(device).full_tensor()
            yield name, tensor


def _summoned(root: Any, model: nn.Module, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
    """Gather under FSDP1, unit by unit."""
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    names = {id(m): name for name, m in model.named_modules()}
    found: set[str] = set()
    with FSDP.summon_full_params(root, recurse=False, writeback=False):
        pass  # marks the root: before the first step another unit would take itself for it
    for unit in FSDP.fsdp_modules(root):
        inside = [m for m in _own_modules(unit) if id(m) in names]
        if not any(wanted(n) for m in inside for n in _names(names[id(m)], m)):
            continue
        with FSDP.summon_full_params(unit, recurse=False, writeback=False):
            for part in inside:
                for name, tensor in _tensors(names[id(part)], part):
                    if wanted(name) and name not in found:
                        found.add(name)
                        yield name, tensor.detach().clone()  # the unit's memory is freed


def _own_modules(unit: nn.Module) -> Iterator[nn.Module]:
    """The modules of an FSDP unit, without those of units inside it."""
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    yield unit
    for child in unit.children():
        if not isinstance(child, FSDP):
            yield from _own_modules(child)


def _tensors(prefix: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    everything = {**module._parameters, **module._buffers}
    for name, tensor in everything.items():
        if tensor is not None and name not in module._non_persistent_buffers_set and name != "_flat_param":
            yield unwrapped_name(f"{prefix}.{name}" if prefix else name), tensor


def _names(prefix: str, module: nn.Module) -> Iterator[str]:
    return (name for name, _ in _tensors(prefix, module))
