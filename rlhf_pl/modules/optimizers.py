"""Optimizer and learning-rate schedule with the defaults of the REBEL recipe."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch

from rlhf_pl.utils.errors import InputError, finite


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` with the recipe's defaults.

    Args:
        params: Parameters or groups.
        lr: Peak learning rate. 3e-7 suits 8B models at 128 pairs an update; small models want more.
        betas: Decay rates of the first and second moment.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
        fused: One pass over the weights for the whole step; null for wherever torch has it. On the CPU it is five
            times as fast.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 3e-7,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 1e-6,
        fused: bool | None = None,
    ) -> None:
        finite("model.optimizer", lr=lr, eps=eps, weight_decay=weight_decay)
        groups = list(params)
        if fused is None:
            tensors = [p for g in groups for p in (g["params"] if isinstance(g, dict) else [g])]
            fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in tensors)
        super().__init__(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)


class WarmupCosine(torch.optim.lr_scheduler.LRScheduler):
    """Linear warm-up, then a cosine to `min_factor`, over the whole run or anew in every round.

    It follows the run's progress instead of counting steps, because how many pairs a round yields is known only once
    the round is there. An update at progress p (0..1) is one of equal slices, and takes the rate at its middle: the
    first update is not wasted on a rate of 0.

    Args:
        optimizer: The optimizer.
        warmup: Share of the span that warms up, from 0 (none) to below 1.
        min_factor: The rate at the end as a share of the peak.
        span: `run` for one warm-up and one cosine over all rounds, `round` for one in every round.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        warmup: float = 0.1,
        min_factor: float = 0.0,
        span: Literal["run", "round"] = "run",
    ) -> None:
        if not 0 <= warmup < 1:
            raise InputError(f"`lr_scheduler.warmup` is a share of the {span}, from 0 to below 1, got {warmup}.")
        if not 0 <= min_factor <= 1:
            raise InputError(f"`lr_scheduler.min_factor` is a share of the peak rate, from 0 to 1, got {min_factor}.")
        self.warmup, self.min_factor, self.span = warmup, min_factor, span
        self.progress: Callable[[], tuple[float, float]] = lambda: (0.0, 0.0)
        super().__init__(optimizer)

    def factor(self, progress: float) -> float:
        """The rate at `progress` (0..1 of the span) as a share of the peak."""
        if progress < self.warmup:
            return progress / self.warmup
        cosine = 0.5 * (1 + math.cos(math.pi * (progress - self.warmup) / (1 - self.warmup)))
        return self.min_factor + (1 - self.min_factor) * cosine

    def follow(self, progress: Callable[[], tuple[float, float]]) -> None:
        """Take the progress of the next update from `progress() -> (of the run, of the round)`, each 0..1."""
        self.progress = progress

    def refresh(self) -> None:
        """Set the optimizer's rates for the next update, when its progress has become known."""
        for group, lr in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = lr

    def get_lr(self) -> list[float | torch.Tensor]:
        of_run, of_round = self.progress()
        factor = self.factor(min(1.0, of_run if self.span == "run" else of_round))
        return [base * factor for base in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """What changes in training; the settings are the config's."""
        settings = ("progress", "warmup", "min_factor", "span")
        return {k: v for k, v in super().state_dict().items() if k not in settings}


def hyperparameters(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Of each parameter group what the config says of it, taken before a checkpoint is restored."""
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def restore_hyperparameters(optimizer: torch.optim.Optimizer, scheduler: Any, settings: list[dict[str, Any]]) -> None:
    """Put `settings` back in place of those that came with a checkpoint.

    A changed base rate scales the present one, so that schedules that go from rate to rate go on where they were.
    """
    for group, wanted in zip(optimizer.param_groups, settings, strict=True):
        old, new = group.get("initial_lr"), wanted.get("initial_lr")
        if old is not None and new is not None and old != new:
            group["lr"] = group["lr"] * new / old if old else new
        group.update({k: v for k, v in wanted.items() if k != "lr"})
    if hasattr(scheduler, "base_lrs"):
        scheduler.base_lrs = [wanted.get("initial_lr", wanted["lr"]) for wanted in settings]
