"""LightningModules."""

from rlhf_pl.modules.rebel import RebelModule

__all__ = ["RebelModule"]
