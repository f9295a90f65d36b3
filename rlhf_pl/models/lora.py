"""LoRA adapters (arXiv:2106.09685) by peft, added to a model in place."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_pl.models.lora_experts import (
    adapts_parameter,
    avoid_parametrization,
    factors,
    find_fused_experts,
    is_read_back_by_peft,
    without_name_conversion,
)
from rlhf_pl.models.lora_reach import find_bypassed_layers, is_refused_by_peft
from rlhf_pl.models.quantization import check_bitsandbytes
from rlhf_pl.models.rounding import round_to
from rlhf_pl.utils.console import console
from rlhf_pl.utils.errors import InputError, check_finite

TensorsOf = Callable[[Callable[[str], bool]], Iterator[tuple[str, Tensor]]]


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters on all linear layers except the output head, and on the fused weights of experts.

    A mixture of experts stores the weights of all its experts in a few parameters, each of shape (experts, rows,
    columns); every expert's matrix gets an adapter of the same rank. Routers get no adapters, unless they are linear
    layers that return plain scores. Neither do layers whose weights a model reads directly, as some of Mamba's.

    Args:
        rank: Rank of the update.
        alpha: The update is scaled by alpha / rank.
        dropout: Dropout on the inputs of the adapters.
        target_modules: Names of the layers, for example `[q_proj, v_proj]`; null for all linear layers of the backbone.
        target_parameters: Names of experts' fused weights, for example `[gate_up_proj, down_proj]`; `[]` for none; null
            for all, or for none if `target_modules` names layers.
        base_dtype: nf4 or fp4 to store the frozen linear layers in 4 bits (QLoRA), on one device or under DDP; null for
            `model.dtype`. Needs bitsandbytes. Checkpoints then contain only the adapters.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: list[str] | None = None
    target_parameters: list[str] | None = None
    base_dtype: Literal["nf4", "fp4"] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"`model.lora.rank` must be 1 or more, got {self.rank}.")
        check_finite("model.lora", alpha=self.alpha)
        if not 0 <= self.dropout < 1:
            raise InputError(f"`model.lora.dropout` must be from 0 to below 1, got {self.dropout}.")


def check_lora(settings: LoRA | None) -> None:
    """Raise InputError if the settings need a package that is not installed."""
    if settings is not None:
        _peft()
        if settings.base_dtype is not None:
            check_bitsandbytes()


def record_settings(settings: LoRA) -> dict[str, Any]:
    """The settings that a run records; options that earlier versions did not have are recorded only if they are set."""
    return {name: value for name, value in vars(settings).items() if (name, value) != ("target_parameters", None)}


def base_dtype(settings: LoRA | None) -> str | None:
    """The 4-bit type of the frozen base; None if it has the module's dtype."""
    return None if settings is None else settings.base_dtype


@dataclass(frozen=True)
class Targets:
    """Names of the layers and parameters that get adapters.

    Args:
        layers: Linear layers.
        parameters: Fused weights of experts.
    """

    layers: list[str]
    parameters: list[str]


def adapter_targets(model: Any, settings: LoRA) -> Targets:
    """Find the layers and parameters of a model that get adapters. The model may be on the meta device.

    Raises:
        InputError: A requested name does not exist, nothing can get adapters, or experts would need dropout.
    """
    linear, fused = _linear_layers(model), find_fused_experts(model)
    leaves = {name.split(".")[-1] for name in linear}
    left_out = find_bypassed_layers(model.config) | {leaf for leaf in leaves if is_refused_by_peft(model, leaf)}
    linear = [name for name in linear if name.split(".")[-1] not in left_out]
    requested, requested_fused = settings.target_modules, settings.target_parameters
    if requested_fused is None and requested is not None:
        requested_fused = []
    found = Targets(
        _select_names("target_modules", "linear layers", model, linear, requested, bool(requested_fused)),
        _select_names("target_parameters", "fused weights of experts", model, list(fused), requested_fused, True),
    )
    if not found.layers and not found.parameters:
        raise InputError(f"`model.lora`: {type(model).__name__} has no linear layers that could get adapters.")
    if found.parameters and settings.dropout > 0:
        raise InputError(
            f"`model.lora.dropout` is {settings.dropout}, but adapters of experts' fused weights don't support it. Set "
            "it to 0, or set `model.lora.target_parameters` to [] for experts without adapters."
        )
    return found


def _select_names(
    option: str, kind: str, model: Any, existing: list[str], requested: list[str] | None, may_be_empty: bool
) -> list[str]:
    """The names of `existing` whose last part is in `requested`; all names for None."""
    if requested is None:
        return existing
    names = sorted({name.split(".")[-1] for name in existing})
    if unknown := [name for name in requested if name not in names] or ([] if requested or may_be_empty else ["none"]):
        others = f"are called {', '.join(names)}. Name some of these" if names else "are none"
        raise InputError(
            f"`model.lora.{option}` names {', '.join(unknown)}; the {kind} of {type(model).__name__} {others}, or set "
            "it to null for all."
        )
    return [name for name in existing if name.split(".")[-1] in requested]


def _linear_layers(model: Any) -> list[str]:
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer

    prefix, kinds = model.base_model_prefix + ".", (torch.nn.Linear, Conv1D)
    return [n for n, m in model.named_modules() if isinstance(m, kinds) and n.startswith(prefix)]


def adapter_size(model: Any, settings: LoRA) -> int:
    """Number of parameters in a model's adapters. The model may be on the meta device."""
    targets, modules, fused = adapter_targets(model, settings), dict(model.named_modules()), find_fused_experts(model)
    size = sum(sum(modules[name].weight.shape) for name in targets.layers)
    size += sum(fused[name][0] * sum(fused[name][1:]) for name in targets.parameters)
    return settings.rank * size


def quantized_size(model: Any) -> int:
    """Number of weights that `base_dtype` stores in 4 bits. The model may be on the meta device."""
    modules = dict(model.named_modules())
    return sum(modules[name].weight.numel() for name in _linear_layers(model))


def add_lora(model: Any, settings: LoRA, seed: int, train_head: bool) -> None:
    """Freeze a Hugging Face model and add trainable adapters to its backbone.

    Args:
        model: Changed in place.
        settings: The adapters' settings.
        seed: Seed of their initial values.
        train_head: Whether all parameters outside the backbone train.
    """
    peft = _peft()
    targets = adapter_targets(model, settings)
    model.requires_grad_(False)
    config = _config(settings, targets)
    with torch.random.fork_rng(), without_name_conversion():
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, model)
    for module in model.modules():
        if adapts_parameter(module):
            avoid_parametrization(module)
    if train_head:
        prefix = model.base_model_prefix + "."
        for name, parameter in model.named_parameters():
            if not name.startswith(prefix):
                parameter.requires_grad_(True)


def adapted_layers(model: Any) -> dict[str, Any]:
    """The layers with adapters, by their names in the unwrapped model.

    peft nests the wrappers of experts with several adapted parameters; the inner ones are named `....base_layer`.
    """
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            found[unwrapped_name(name)] = module
    return found


def plain_name(name: str) -> str:
    """A tensor's name in the model without adapters."""
    return re.sub(r"(\.base_layer)+\.", ".", name)


def _adapted_tensors(layers: Mapping[str, Any]) -> dict[str, str]:
    """Maps the name of each adapted tensor to the name of the layer that adapts it."""
    found = {}
    for name, layer in layers.items():
        inner, place = layer.base_layer, f"{name}.base_layer"
        while hasattr(inner, "base_layer"):
            inner, place = inner.base_layer, f"{place}.base_layer"
        found[f"{place}.{getattr(layer, 'parameter_name', 'weight')}"] = name
    return found


def adapted_names(model: Any) -> set[str]:
    """Names of the tensors that adapters are merged into, in the model without adapters."""
    return {plain_name(name) for name in _adapted_tensors(adapted_layers(model))}


def unwrapped_name(name: str) -> str:
    """A parameter's or module's name without the parts that FSDP and activation checkpointing add."""
    for wrapper in ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
        name = name.replace(wrapper, "")
    for wrapper in ("._fsdp_wrapped_module", "._checkpoint_wrapped_module"):
        name = name.removesuffix(wrapper)
    return name


def merged_tensors(model: Any, tensors: TensorsOf) -> Iterator[tuple[str, Tensor]]:
    """A model's tensors with adapters merged into copies, named as in the model without adapters.

    Args:
        model: A Hugging Face model, with or without adapters.
        tensors: Yields the model's full tensors whose names pass a filter.
    """
    layers = adapted_layers(model)
    if not layers:
        yield from tensors(lambda name: True)
        return
    adapters = {name: tensor.detach().clone() for name, tensor in tensors(lambda name: ".lora_" in name)}
    adapted = _adapted_tensors(layers)
    for name, tensor in tensors(lambda name: ".lora_" not in name):
        if (layer := adapted.get(name)) is not None:
            tensor = round_to(tensor.float() + _compute_update(layers[layer], layer, adapters), tensor.dtype)
        yield plain_name(name), tensor


def _compute_update(layer: Any, name: str, adapters: dict[str, Tensor]) -> Tensor:
    """The update of a layer's weight by its adapters, in the weight's shape, float32."""
    total: Any = 0
    for adapter in layer.active_adapters:
        down, up = (adapters[f"{name}.lora_{part}.{adapter}.weight"].float() for part in "AB")
        if adapts_parameter(layer):
            left, right = factors(layer, down, up)
            update = left @ right
        else:
            update = up @ down
            update = update.T if layer.fan_in_fan_out else update
        total = total + layer.scaling[adapter] * update
    return total


@contextmanager
def without_adapters(model: Any) -> Iterator[None]:
    """Disable a model's adapters inside the context. For inference: `requires_grad` does not change."""
    layers = list(adapted_layers(model).values())
    for layer in layers:
        layer._disable_adapters = True  # `enable_adapters` would also change `requires_grad`
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def adapted_targets(model: Any) -> Targets:
    """The layers and parameters of a model that have adapters."""
    layers = adapted_layers(model)
    parameters = [plain_name(n) for n, layer in _adapted_tensors(layers).items() if adapts_parameter(layers[layer])]
    return Targets(sorted(n for n, layer in layers.items() if not adapts_parameter(layer)), sorted(parameters))


def save_adapter(
    settings: LoRA, targets: Targets, model: Any, adapters: Mapping[str, Tensor], base: str, folder: str
) -> None:
    """Write the adapters to a folder that peft can load, unless peft would attach them to other layers.

    Args:
        settings: The adapters' settings.
        targets: The layers and parameters with adapters.
        model: A model of the same architecture.
        adapters: The adapters' tensors, by their names in the model.
        base: Folder or Hub id of the base model.
        folder: Target folder; created if missing.
    """
    from safetensors.torch import save_file

    config = _config(settings, targets)
    if not is_read_back_by_peft(config, model):
        kind = type(model).__name__
        console.print(
            f"Adapters are exported only in merged form: peft would attach them to other layers of {kind}.",
            soft_wrap=True,
        )
        return
    config.base_model_name_or_path, config.task_type, config.inference_mode = base, "CAUSAL_LM", True
    config.save_pretrained(folder)
    tensors = {f"base_model.model.{n.replace('.default.', '.')}": t.cpu().contiguous() for n, t in adapters.items()}
    save_file(tensors, f"{folder}/adapter_model.safetensors", metadata={"format": "pt"})


def _config(settings: LoRA, targets: Targets) -> Any:
    return _peft().LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets.layers,
        target_parameters=targets.parameters or None,
    )


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise InputError("`model.lora` needs the package peft: pip install 'rlhf-pl[lora]'.") from error
    return peft
