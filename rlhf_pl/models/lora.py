"""LoRA adapters (arXiv:2106.09685) by peft, put into a model in place."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_pl.models.lora_experts import (
    adapt_in_place_of_weight,
    adapts_parameter,
    factors,
    fused_experts,
    names_as_given,
    peft_reads_back,
)
from rlhf_pl.models.lora_reach import bypassed_layers, refused_by_peft
from rlhf_pl.models.quantization import check_bitsandbytes
from rlhf_pl.utils.console import console
from rlhf_pl.utils.errors import InputError, finite

TensorsOf = Callable[[Callable[[str], bool]], Iterator[tuple[str, Tensor]]]


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters on every linear layer but the output head, and on the fused weights of experts.

    A mixture of experts keeps the weights of all its experts in a few parameters, each of shape (experts, rows,
    columns); every expert's matrix gets an adapter of the same rank. Routers stay as they are, unless they are linear
    layers that give plain scores. So do layers that a model reads the weights of, such as some of Mamba's.

    Args:
        rank: Rank of the update.
        alpha: The update is scaled by alpha / rank.
        dropout: Dropout in front of the adapters.
        target_modules: Names of the layers, such as `[q_proj, v_proj]`; null for every linear layer of the backbone.
        target_parameters: Names of experts' fused weights, such as `[gate_up_proj, down_proj]`; `[]` for none of them;
            null for all of them, or for none where `target_modules` names layers.
        base_dtype: nf4 or fp4 to keep the frozen linear layers in 4 bits (QLoRA), on one device or under DDP; null for
            `model.dtype`. Needs bitsandbytes. Checkpoints then hold the adapters alone.
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
        finite("model.lora", alpha=self.alpha)
        if not 0 <= self.dropout < 1:
            raise InputError(f"`model.lora.dropout` must be from 0 to below 1, got {self.dropout}.")


def check_lora(settings: LoRA | None) -> None:
    """Raise InputError where adapters are wanted and peft is not installed."""
    if settings is not None:
        _peft()
        if settings.base_dtype is not None:
            check_bitsandbytes()


def noted(settings: LoRA) -> dict[str, Any]:
    """What a run notes of its adapters: what was not there in earlier versions, only where it is used."""
    return {name: value for name, value in vars(settings).items() if (name, value) != ("target_parameters", None)}


def base_dtype(settings: LoRA | None) -> str | None:
    """How the frozen base is kept, if not in the module's dtype."""
    return None if settings is None else settings.base_dtype


@dataclass(frozen=True)
class Targets:
    """What gets adapters, by the names in the model.

    Args:
        layers: Linear layers.
        parameters: Fused weights of experts.
    """

    layers: list[str]
    parameters: list[str]


def adapter_targets(model: Any, settings: LoRA) -> Targets:
    """What gets adapters in a model that may be on the meta device.

    Raises:
        InputError: A name that was asked for is not there, there is nothing, or dropout is asked for on experts.
    """
    linear, fused = _linear_layers(model), fused_experts(model)
    leaves = {name.split(".")[-1] for name in linear}
    left_out = bypassed_layers(model.config) | {leaf for leaf in leaves if refused_by_peft(model, leaf)}
    linear = [name for name in linear if name.split(".")[-1] not in left_out]
    wanted, wanted_fused = settings.target_modules, settings.target_parameters
    if wanted_fused is None and wanted is not None:
        wanted_fused = []
    found = Targets(
        _named("target_modules", "linear layers", model, linear, wanted, bool(wanted_fused)),
        _named("target_parameters", "fused weights of experts", model, list(fused), wanted_fused, True),
    )
    if not found.layers and not found.parameters:
        raise InputError(f"`model.lora`: {type(model).__name__} has no linear layers that adapters could be put on.")
    if found.parameters and settings.dropout > 0:
        raise InputError(
            f"`model.lora.dropout` is {settings.dropout}, but adapters of experts' fused weights have none. Set it to "
            "0, or `model.lora.target_parameters` to [] to leave the experts as they are."
        )
    return found


def _named(
    option: str, kind: str, model: Any, there: list[str], wanted: list[str] | None, may_be_empty: bool
) -> list[str]:
    """Those of `there` whose last part is in `wanted`; all of them for None."""
    if wanted is None:
        return there
    names = sorted({name.split(".")[-1] for name in there})
    if unknown := [name for name in wanted if name not in names] or ([] if wanted or may_be_empty else ["none"]):
        others = f"are called {', '.join(names)}. Name some of these" if names else "are none"
        raise InputError(
            f"`model.lora.{option}` names {', '.join(unknown)}; the {kind} of {type(model).__name__} {others}, or give "
            "null for all."
        )
    return [name for name in there if name.split(".")[-1] in wanted]


def _linear_layers(model: Any) -> list[str]:
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer

    prefix, kinds = model.base_model_prefix + ".", (torch.nn.Linear, Conv1D)
    return [n for n, m in model.named_modules() if isinstance(m, kinds) and n.startswith(prefix)]


def adapter_size(model: Any, settings: LoRA) -> int:
    """Numbers in the adapters of a model that may be on the meta device."""
    targets, modules, fused = adapter_targets(model, settings), dict(model.named_modules()), fused_experts(model)
    size = sum(sum(modules[name].weight.shape) for name in targets.layers)
    size += sum(fused[name][0] * sum(fused[name][1:]) for name in targets.parameters)
    return settings.rank * size


def add_lora(model: Any, settings: LoRA, seed: int, train_head: bool) -> None:
    """Freeze a Hugging Face model and put trainable adapters into its backbone.

    Args:
        model: Changed in place.
        settings: The adapters.
        seed: Of their initial values.
        train_head: Whether what stands on the backbone trains as a whole.
    """
    peft = _peft()
    targets = adapter_targets(model, settings)
    model.requires_grad_(False)
    config = _config(settings, targets)
    with torch.random.fork_rng(), names_as_given():
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, model)
    for module in model.modules():
        if adapts_parameter(module):
            adapt_in_place_of_weight(module)
    if train_head:
        prefix = model.base_model_prefix + "."
        for name, parameter in model.named_parameters():
            if not name.startswith(prefix):
                parameter.requires_grad_(True)


def adapted_layers(model: Any) -> dict[str, Any]:
    """The layers with adapters, by the names they have in a model that is not wrapped.

    Experts with several adapted parameters are one inside the other, the inner ones named `....base_layer`.
    """
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            found[unwrapped_name(name)] = module
    return found


def plain_name(name: str) -> str:
    """A tensor's name as it is without adapters."""
    return re.sub(r"(\.base_layer)+\.", ".", name)


def _adapted_tensors(layers: Mapping[str, Any]) -> dict[str, str]:
    """By the name of each adapted tensor that of the layer that adapts it."""
    found = {}
    for name, layer in layers.items():
        inner, place = layer.base_layer, f"{name}.base_layer"
        while hasattr(inner, "base_layer"):
            inner, place = inner.base_layer, f"{place}.base_layer"
        found[f"{place}.{getattr(layer, 'parameter_name', 'weight')}"] = name
    return found


def unwrapped_name(name: str) -> str:
    """A parameter's or module's name without what FSDP and activation checkpointing put into it."""
    for wrapper in ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
        name = name.replace(wrapper, "")
    for wrapper in ("._fsdp_wrapped_module", "._checkpoint_wrapped_module"):
        name = name.removesuffix(wrapper)
    return name


def merged_tensors(model: Any, tensors: TensorsOf) -> Iterator[tuple[str, Tensor]]:
    """A model's tensors with adapters merged in, in copies, under the names they have without adapters.

    Args:
        model: A Hugging Face model, with adapters or without.
        tensors: Gives those of its tensors whose names are wanted, whole.
    """
    layers = adapted_layers(model)
    if not layers:
        yield from tensors(lambda name: True)
        return
    adapters = {name: tensor.detach().clone() for name, tensor in tensors(lambda name: ".lora_" in name)}
    adapted = _adapted_tensors(layers)
    for name, tensor in tensors(lambda name: ".lora_" not in name):
        if (layer := adapted.get(name)) is not None:
            tensor = (tensor.float() + _update(layers[layer], layer, adapters)).to(tensor.dtype)
        yield plain_name(name), tensor


def _update(layer: Any, name: str, adapters: dict[str, Tensor]) -> Tensor:
    """What a layer's adapters add to its weight, in its shape, float32."""
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
    """The model as it was before adapters were put into it. For inference: what trains is left alone."""
    layers = list(adapted_layers(model).values())
    for layer in layers:
        layer._disable_adapters = True  # `enable_adapters` would also touch what requires gradients
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def adapted_targets(model: Any) -> Targets:
    """What has adapters in a model."""
    layers = adapted_layers(model)
    parameters = [plain_name(n) for n, layer in _adapted_tensors(layers).items() if adapts_parameter(layers[layer])]
    return Targets(sorted(n for n, layer in layers.items() if not adapts_parameter(layer)), sorted(parameters))


def save_adapter(
    settings: LoRA, targets: Targets, model: Any, adapters: Mapping[str, Tensor], base: str, folder: str
) -> None:
    """Write the adapters as a folder that peft loads onto the base model, unless peft would put them elsewhere.

    Args:
        settings: The adapters' settings.
        targets: What has adapters.
        model: Of that architecture.
        adapters: Their tensors, by their names in the model.
        base: Folder or Hub id of the base model.
        folder: Where to; made if missing.
    """
    from safetensors.torch import save_file

    config = _config(settings, targets)
    if not peft_reads_back(config, model):
        kind = type(model).__name__
        console.print(f"Adapters are exported merged alone: peft would put them elsewhere in {kind}.", soft_wrap=True)
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
