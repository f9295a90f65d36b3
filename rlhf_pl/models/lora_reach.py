"""Which linear layers an adapter reaches: those that the model calls, and that give it a tensor."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_pl.models.compute import Compute
from rlhf_pl.models.kernel_check import NoCopyError, once, small_copies


def bypassed_layers(config: Any) -> set[str]:
    """Last parts of the names of linear layers that a model never calls for a tensor, tried on a small copy of it.

    Mamba's mixers, for one, compute with the weights of their `dt_proj`: an adapter in front of the layer would change
    nothing in training, and the merged weights everything. PhiMoE's router is a linear layer that gives a choice of
    experts, to which no adapter can add.
    """
    return once(config, Compute(), torch.float32, "bypassed", lambda: _never_called(config))


@torch.no_grad()
def _never_called(config: Any) -> set[str]:
    try:
        copies = small_copies(config, Compute(), torch.float32)
    except NoCopyError:
        return set()
    there: set[str] = set()
    called: set[str] = set()
    for name, module in copies.exact.base_model.named_modules():
        if isinstance(module, nn.Linear):
            leaf = name.split(".")[-1]
            there.add(leaf)
            module.register_forward_hook(partial(_note, called, leaf))
    copies.hidden(copies.exact)
    return there - called


def _note(called: set[str], leaf: str, module: nn.Module, args: Any, output: Any) -> None:
    if isinstance(output, Tensor):
        called.add(leaf)


def refused_by_peft(model: Any, leaf: str) -> bool:
    """Whether peft puts no adapter on layers of that name: `out_proj` of Mamba, whose fused kernels pass it by."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba

    try:
        _check_lora_target_modules_mamba(LoraConfig(), model, leaf)
    except ValueError:
        return True
    return False
