"""Broadcasts a model that only rank 0 has read to all ranks, part by part."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn

from rlhf_pl.distributed.ranks import Ranks
from rlhf_pl.models.config_files import has_weights
from rlhf_pl.models.source import ModelSource


def reads_weights(trainer: L.Trainer | None) -> bool:
    """Whether this rank reads weights. Other ranks build the model on the meta device and receive them from rank 0.

    Under FSDPStrategy every rank reads them, because Lightning wraps the model later by itself.
    """
    if trainer is None or trainer.world_size == 1 or isinstance(trainer.strategy, FSDPStrategy):
        return True
    return trainer.global_rank == 0


def checks_weights(trainer: L.Trainer, source: ModelSource) -> bool:
    """Whether this rank checks a model's weight files: it will read them, or has them too."""
    return reads_weights(trainer) or has_weights(Path(source.path))


class Placement:
    """Moves the parts of a model to their device one by one, with rank 0's weights on all ranks.

    A rank holds only what it has moved: a part that is sharded right after its move is whole for a moment.

    Args:
        unit: The model; on the meta device except on rank 0.
        device: This rank's device.
        ranks: All of them must move the same parts in the same order.
    """

    def __init__(self, unit: nn.Module, device: torch.device, ranks: Ranks) -> None:
        self.device, self.ranks = device, ranks
        own = {name: tensor.dtype for name, tensor in _tensors(unit)}
        self._dtypes = ranks.broadcast(own)  # rank 0's, since reading may keep some tensors in float32
        self._names = {id(tensor): name for name, tensor in _tensors(unit)}
        self._moved: dict[
            int, tuple[Tensor, Tensor]
        ] = {}  # keeps the original tensor alive, so that its id stays unique

    def move(self, part: nn.Module) -> None:
        """Move a part of the model. Tensors shared with an earlier part are reused."""
        for module in part.modules():
            slots: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for slot in slots:
                for name, tensor in slot.items():
                    if tensor is not None and id(tensor) in self._names:
                        slot[name] = self._moved_tensor(tensor)

    def _moved_tensor(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._moved:
            if self.ranks.is_first:
                here = tensor.detach().to(self.device).contiguous()
            else:
                dtype = self._dtypes[self._names[id(tensor)]]
                here = torch.empty(tensor.shape, dtype=dtype, device=self.device)
            dist.broadcast(here, 0)
            if isinstance(tensor, nn.Parameter):
                here = nn.Parameter(here, requires_grad=tensor.requires_grad)
            self._moved[id(tensor)] = (tensor, here)
        return self._moved[id(tensor)][1]


def _tensors(unit: nn.Module) -> list[tuple[str, Tensor]]:
    return [*unit.named_parameters(), *unit.named_buffers()]
