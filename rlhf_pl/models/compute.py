"""Device and dtype of a model's computation, from the Trainer's strategy and precision."""

from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

HALF = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Compute:
    """Device and dtypes that a model computes with; its choice of kernels depends on them.

    Args:
        device: The model's device.
        dtype: Dtype of the weights in matrix products; None for the dtype they are loaded in.
        autocast: Dtype of autocast; None without autocast.
        sharded: Whether the strategy shards the weights, and casts them itself.
    """

    device: torch.device = _CPU
    dtype: torch.dtype | None = None
    autocast: torch.dtype | None = None
    sharded: bool = False

    def weights_dtype(self, loaded: torch.dtype) -> torch.dtype:
        """Dtype of the weights in matrix products, for a model loaded in `loaded`."""
        return loaded if self.dtype is None else self.dtype


def get_compute(trainer: L.Trainer | None) -> Compute:
    """Device and dtypes of a module's model under this Trainer.

    `bf16-mixed` computes with bfloat16 copies of the weights: those of `WorkingCopy` on a device that holds all
    weights, FSDP's where the weights are sharded. `16-mixed` uses autocast, which keeps operations that could overflow
    in float32.
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
