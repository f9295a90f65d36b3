"""LoRA adapters (arXiv:2106.09685) by peft, put into a model in place."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_pl.errors import InputError
from rlhf_pl.quantized import check_bitsandbytes

TensorsOf = Callable[[Callable[[str], bool]], Iterator[tuple[str, Tensor]]]


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters on every linear layer but the output head.

    Args:
        rank: Rank of the update.
        alpha: The update is scaled by alpha / rank.
        dropout: Dropout in front of the adapters.
        target_modules: Names of the layers, such as `[q_proj, v_proj]`; null for every linear layer of the backbone.
        base_dtype: nf4 or fp4 to keep the frozen linear layers in 4 bits (QLoRA), on one device or under DDP; null for
            `model.dtype`. Needs bitsandbytes. Checkpoints then hold the adapters alone.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: list[str] | None = None
    base_dtype: Literal["nf4", "fp4"] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"`model.lora.rank` must be 1 or more, got {self.rank}.")
        if not 0 <= self.dropout < 1:
            raise InputError(f"`model.lora.dropout` must be from 0 to below 1, got {self.dropout}.")


def check_lora(settings: LoRA | None) -> None:
    """Raise InputError where adapters are wanted and peft is not installed."""
    if settings is not None:
        _peft()
        if settings.base_dtype is not None:
            check_bitsandbytes()


def base_dtype(settings: LoRA | None) -> str | None:
    """How the frozen base is kept, if not in the module's dtype."""
    return None if settings is None else settings.base_dtype


def adaptable_layers(model: Any, settings: LoRA) -> list[str]:
    """Names of the layers that get adapters, in a model that may be on the meta device.

    Raises:
        InputError: A name that was asked for is no linear layer's.
    """
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer

    prefix, kinds = model.base_model_prefix + ".", (torch.nn.Linear, Conv1D)
    linear = [n for n, m in model.named_modules() if isinstance(m, kinds) and n.startswith(prefix)]
    if not linear:
        raise InputError(f"`model.lora`: {type(model).__name__} has no linear layers that adapters could be put on.")
    wanted = settings.target_modules
    if wanted is None:
        return linear
    there = sorted({name.split(".")[-1] for name in linear})
    if unknown := [name for name in wanted if name not in there] or ([] if wanted else ["none"]):
        raise InputError(
            f"`model.lora.target_modules` names {', '.join(unknown)}; the linear layers of {type(model).__name__} are "
            f"called {', '.join(there)}. Name some of these, or give null for all."
        )
    return [name for name in linear if name.split(".")[-1] in wanted]


def add_lora(model: Any, settings: LoRA, seed: int, train_head: bool) -> None:
    """Freeze a Hugging Face model and put trainable adapters into its backbone.

    Args:
        model: Changed in place.
        settings: The adapters.
        seed: Of their initial values.
        train_head: Whether what stands on the backbone trains as a whole.
    """
    peft = _peft()
    linear = adaptable_layers(model, settings)
    model.requires_grad_(False)
    config = _config(settings, linear)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, model)
    if train_head:
        prefix = model.base_model_prefix + "."
        for name, parameter in model.named_parameters():
            if not name.startswith(prefix):
                parameter.requires_grad_(True)


def adapted_layers(model: Any) -> dict[str, Any]:
    """The layers with adapters, by the names they have in a model that is not wrapped."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            found[unwrapped_name(name)] = module
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
    for name, tensor in tensors(lambda name: ".lora_" not in name):
        layer_name, base, _ = name.rpartition(".base_layer.weight")
        if base:
            tensor = (tensor.float() + _update(layers[layer_name], layer_name, adapters)).to(tensor.dtype)
        yield name.replace(".base_layer.", "."), tensor


def _update(layer: Any, name: str, adapters: dict[str, Tensor]) -> Tensor:
    """What a layer's adapters add to its weight, in its shape, float32."""
    total: Any = 0
    for adapter in layer.active_adapters:
        down, up = (adapters[f"{name}.lora_{part}.{adapter}.weight"].float() for part in "AB")
        update = up @ down
        total = total + layer.scaling[adapter] * (update.T if layer.fan_in_fan_out else update)
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


def save_adapter(settings: LoRA, layers: Sequence[str], adapters: Mapping[str, Tensor], base: str, folder: str) -> None:
    """Write the adapters as a folder that peft loads onto the base model.

    Args:
        settings: The adapters' settings.
        layers: Names of the adapted layers.
        adapters: Their tensors, by their names in the model.
        base: Folder or Hub id of the base model.
        folder: Where to; made if missing.
    """
    from safetensors.torch import save_file

    config = _config(settings, list(layers))
    config.base_model_name_or_path, config.task_type, config.inference_mode = base, "CAUSAL_LM", True
    config.save_pretrained(folder)
    tensors = {f"base_model.model.{n.replace('.default.', '.')}": t.cpu().contiguous() for n, t in adapters.items()}
    save_file(tensors, f"{folder}/adapter_model.safetensors", metadata={"format": "pt"})


def _config(settings: LoRA, layers: list[str]) -> Any:
    return _peft().LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=layers
    )


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise InputError("`model.lora` needs the package peft: pip install 'rlhf-pl[lora]'.") from error
    return peft
