"""Which linear layers an adapter reaches: those that the model calls, rather than reading their weights itself."""

from typing import Any

import torch
from torch import nn

from rlhf_pl.compute import Compute
from rlhf_pl.kernel_check import NoCopyError, once, small_copies


def bypassed_layers(config: Any) -> set[str]:
    """Last parts of the names of linear layers that a model never calls, tried on a small copy of it.

    Mamba's mixers, for one, compute with the weights of their `dt_proj`: an adapter in front of the layer would change
    nothing in training, and the merged weights everything.
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
            module.register_forward_hook(lambda *_, leaf=leaf: called.add(leaf))
    copies.hidden(copies.exact)
    return there - called
