"""Optimizer and learning-rate schedules under the names that configs use: `rlhf_pl.optim.AdamW`."""

from rlhf_pl.modules.optimizers import AdamW, WarmupCosine, WarmupLinear

__all__ = ["AdamW", "WarmupCosine", "WarmupLinear"]
