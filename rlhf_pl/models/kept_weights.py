"""The weights of a policy before it trained on a round, stored in CPU memory."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class KeptWeights:
    """A copy of the policy's trainable weights, which can temporarily replace the current ones.

    Each rank stores only its own shards. GPU memory grows by one tensor at a time.

    Args:
        module: Holds the policy, which must be idle while weights are copied or swapped.
    """

    def __init__(self, module: L.LightningModule) -> None:
        self.module = module
        reshard(module)
        self._kept = [tensor.to("cpu", copy=True) for _, tensor in _trainable_tensors(module)]

    @classmethod
    def from_state(cls, module: L.LightningModule, state: Mapping[str, Tensor], prefix: str) -> "KeptWeights":
        """Copy whole tensors, named as in the module without `prefix`; for modules that are not sharded."""
        kept = cls.__new__(cls)
        kept.module = module
        kept._kept = [
            state[n.removeprefix(prefix)].detach().to("cpu", t.dtype, copy=True) for n, t in _trainable_tensors(module)
        ]
        return kept

    def update(self) -> None:
        """Store the module's current weights."""
        reshard(self.module)
        for kept, (_, own) in zip(self._kept, _trainable_tensors(self.module), strict=True):
            kept.copy_(own)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Give the module the stored weights inside the context."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        reshard(self.module)
        for kept, (_, own) in zip(self._kept, _trainable_tensors(self.module), strict=True):
            current = own.clone()
            own.copy_(kept)
            kept.copy_(current)


def _trainable_tensors(module: L.LightningModule) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the policy that the optimizer updates on this rank, without those of a critic."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and name.startswith("policy.") and ".value_head." not in name:
            own = parameter.detach()
            yield name, own.to_local() if isinstance(own, DTensor) else own


def reshard(module: L.LightningModule) -> None:
    """Free the full weights that FSDP keeps after a forward pass: it would not notice that the shards have changed."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    root: Any = module.trainer.model
    for part in root.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
        elif isinstance(part, FSDP):
            _reshard_unit(part._handle)


def _reshard_unit(handle: Any) -> None:
    """Reshard a unit of FSDP1, unless it has no weights or was never used."""
    if handle is None or not hasattr(handle.flat_param, "_full_param_padded"):
        return
    if handle.uses_sharded_strategy and not handle.needs_unshard():
        handle.reshard(True)
        handle.post_reshard()
