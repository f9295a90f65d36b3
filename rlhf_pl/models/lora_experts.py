"""Adapters on the fused weights of experts, by peft's `target_parameters`."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from typing import Any

import torch
from torch import Tensor


def find_fused_experts(model: Any) -> dict[str, torch.Size]:
    """Shapes (experts, rows, columns) of the parameters that hold all experts of a layer, by parameter name."""
    prefix = model.base_model_prefix + "."
    return {
        f"{name}.{key}": parameter.shape
        for name, module in model.named_modules()
        if name.startswith(prefix) and not type(module).__module__.startswith("torch.nn")  # excludes convolutions
        for key, parameter in module._parameters.items()
        if parameter is not None and parameter.dim() == 3 and parameter.is_floating_point() and min(parameter.shape) > 1
    }


def adapts_parameter(layer: Any) -> bool:
    """Whether an adapted layer of peft wraps one parameter of a module instead of a linear layer."""
    return hasattr(layer, "parameter_name")


def factors(layer: Any, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The two factors of all experts' updates; their product has the shape of the adapted parameter.

    Args:
        layer: The layer with the adapter.
        down: Its `lora_A`, shape (experts * rank, in).
        up: Its `lora_B`, shape (out, rank * experts).

    Returns:
        Shapes (experts, rows, rank) and (experts, rank, columns).
    """
    down = down.reshape(layer.num_experts, -1, down.shape[-1])
    up = up.reshape(up.shape[0], -1, layer.num_experts).permute(2, 0, 1)
    if layer._did_swap_in_out_features:  # the parameter is (experts, out, in)
        return up, down
    return down.transpose(1, 2), up.transpose(1, 2)


def avoid_parametrization(layer: Any) -> None:
    """Make a layer store its adapted parameter in its module's `__dict__` during a forward pass.

    peft registers and removes a parametrization instead, which works neither with flattened parameters (FSDP) nor with
    weights that are copies (`WorkingCopy`).
    """
    layer.__class__ = _adapter_class()


@cache
def _adapter_class() -> Any:
    from peft.tuners.lora.layer import ParamWrapper

    class ExpertsAdapter(ParamWrapper):
        @contextmanager
        def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
            inner, name = self.get_base_layer(), self.parameter_name
            weight = getattr(inner, name)
            with torch.autocast(weight.device.type, enabled=False):
                for adapter in active_adapters:
                    left, right = factors(self, self.lora_A[adapter].weight, self.lora_B[adapter].weight)
                    left, right = left.to(weight.dtype), right.to(weight.dtype)
                    weight = torch.baddbmm(weight, left, right, alpha=self.scaling[adapter])
            before = vars(inner).get(name)
            vars(inner)[name] = weight
            try:
                yield
            finally:
                del vars(inner)[name]
                if before is not None:
                    vars(inner)[name] = before

    return ExpertsAdapter


@contextmanager
def without_name_conversion() -> Iterator[None]:
    """Stop peft from converting names of layers inside the context.

    In some architectures, peft mistakes layers called `gate_proj`, for example those of shared experts, for the
    experts' weights, which earlier versions of transformers gave that name.
    """
    from peft.utils import transformers_weight_conversion as conversion

    convert = conversion.convert_peft_config_for_transformers
    conversion.convert_peft_config_for_transformers = lambda *args, **kwargs: None
    try:
        yield
    finally:
        conversion.convert_peft_config_for_transformers = convert


def is_read_back_by_peft(config: Any, model: Any) -> bool:
    """Whether peft, when it loads adapters with this config, attaches them to the same layers."""
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    read = deepcopy(config)
    try:
        convert_peft_config_for_transformers(read, model=model, conversions=None)
    except ValueError:
        return False
    return all(
        set(getattr(read, name) or []) == set(getattr(config, name) or [])
        for name in ("target_modules", "target_parameters")
    )
