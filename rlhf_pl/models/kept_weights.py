"""The weights that a policy had before it trained on a round, kept in the memory of the CPU."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class KeptWeights:
    """A copy of all weights that train, which can take their place for a while.

    A rank keeps its own shards alone. Nothing is added to a GPU's memory but one tensor at a time.

    Args:
        module: Holds the policy; nothing of it is in use while a copy is made or put in place.
    """

    def __init__(self, module: L.LightningModule) -> None:
        self.module = module
        reshard(module)
        self._kept = [tensor.to("cpu", copy=True) for _, tensor in _trained(module)]

    @classmethod
    def of_state(cls, module: L.LightningModule, state: Mapping[str, Tensor], prefix: str) -> "KeptWeights":
        """Of whole tensors, by their names in the module after `prefix`; for modules that are not sharded."""
        kept = cls.__new__(cls)
        kept.module = module
        kept._kept = [state[n.removeprefix(prefix)].detach().to("cpu", t.dtype, copy=True) for n, t in _trained(module)]
        return kept

    def update(self) -> None:
        """Keep the present weights instead."""
        reshard(self.module)
        for kept, (_, own) in zip(self._kept, _trained(self.module), strict=True):
            kept.copy_(own)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """In which the module has the weights that were kept."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        reshard(self.module)
        for kept, (_, own) in zip(self._kept, _trained(self.module), strict=True):
            present = own.clone()
            own.copy_(kept)
            kept.copy_(present)


def _trained(module: L.LightningModule) -> Iterator[tuple[str, Tensor]]:
    """What the optimizer writes to, on this rank."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            own = parameter.detach()
            yield name, own.to_local() if isinstance(own, DTensor) else own


def reshard(module: L.LightningModule) -> None:
    """Drop what FSDP holds of whole weights after a forward pass: it would not see that the shards have changed."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    root: Any = module.trainer.model
    for part in root.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
        elif isinstance(part, FSDP):
            _reshard_unit(part._handle)


def _reshard_unit(handle: Any) -> None:
    """Of FSDP1; one that has no weights, or has not been used yet, has nothing to drop."""
    if handle is None or not hasattr(handle.flat_param, "_full_param_padded"):
        return
    if handle.uses_sharded_strategy and not handle.needs_unshard():
        handle.reshard(True)
        handle.post_reshard()
