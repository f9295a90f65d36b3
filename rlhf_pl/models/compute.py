"""Where a model computes and in which dtype, as the Trainer's strategy and precision say."""

from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

HALF = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Compute:
    """What a model's kernels depend on.

    Args:
        device: Where it runs.
        dtype: Of the weights when they multiply; None for the dtype they are loaded in.
        autocast: The dtype autocast casts to; None without it.
        sharded: Whether the strategy shards the weights, and casts them itself.
    """

    device: torch.device = _CPU
    dtype: torch.dtype | None = None
    autocast: torch.dtype | None = None
    sharded: bool = False

    def weights_dtype(self, loaded: torch.dtype) -> torch.dtype:
        """Dtype of the weights when they multiply, of a model loaded in `loaded`."""
        return loaded if self.dtype is None else self.dtype


def compute_of(trainer: L.Trainer | None) -> Compute:
    """How a module's model computes under this Trainer.

    `bf16-mixed` multiplies bfloat16 copies of the weights: of one's own on a device that holds all of them (see
    `WorkingCopy`), FSDP's where they are sharded. `16-mixed` is autocast's, which scales nothing down that could
    overflow.
    """
    if trainer is None:
        return Compute()
    strategy: Any = trainer.strategy
    device, half = strategy.root_device, HALF.get(str(trainer.precision))
    sharded = isinstance(strategy, FSDPStrategy | ModelParallelStrategy)
    mixed = getattr(strategy, "mixed_precision", None)
    if mixed is not None and mixed.param_dtype is not None:  # given to FSDPStrategy
        half = mixed.param_dtype
    if half == torch.float16 and not sharded:
        return Compute(device, autocast=half)
    return Compute(device, half, sharded=sharded)
