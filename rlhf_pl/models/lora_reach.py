"""Finds the linear layers on which an adapter has an effect: those that the model calls and that return a tensor."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_pl.models.compute import Compute
from rlhf_pl.models.kernel_check import NoCopyError, cached_check, small_copies


def find_bypassed_layers(config: Any) -> set[str]:
    """Find the linear layers that a model never calls for a tensor, on a small copy; last parts of their names.

    Mamba's mixers, for example, read the weights of their `dt_proj`: an adapter on the layer would have no effect in
    training, but its merged weights would. PhiMoE's router is a linear layer that returns a choice of experts, to which
    an adapter can't add.
    """
    return cached_check(config, Compute(), torch.float32, "bypassed", lambda: _find_uncalled_layers(config))


@torch.no_grad()
def _find_uncalled_layers(config: Any) -> set[str]:
    try:
        copies = small_copies(config, Compute(), torch.float32)
    except NoCopyError:
        return set()
    linear_layers: set[str] = set()
    called: set[str] = set()
    for name, module in copies.exact.base_model.named_modules():
        if isinstance(module, nn.Linear):
            leaf = name.split(".")[-1]
            linear_layers.add(leaf)
            module.register_forward_hook(partial(_record_call, called, leaf))
    copies.hidden(copies.exact)
    return linear_layers - called


def _record_call(called: set[str], leaf: str, module: nn.Module, args: Any, output: Any) -> None:
    if isinstance(output, Tensor):
        called.add(leaf)


def is_refused_by_peft(model: Any, leaf: str) -> bool:
    """Whether peft refuses adapters on layers with that name: Mamba's fused kernels bypass its `out_proj`."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba

    try:
        _check_lora_target_modules_mamba(LoraConfig(), model, leaf)
    except ValueError:
        return True
    return False
