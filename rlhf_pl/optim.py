"""Optimizer and learning-rate schedule under the names that configs use: `rlhf_pl.optim.AdamW`."""

from rlhf_pl.modules.optimizers import AdamW, WarmupCosine

__all__ = ["AdamW", "WarmupCosine"]
