"""Optimizer and learning-rate schedules with the defaults of the REBEL recipe."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any, Literal

import torch

from rlhf_pl.modules.learning_rates import resolve_rate
from rlhf_pl.utils.errors import InputError, check_finite


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` with the defaults of the REBEL recipe, and a learning rate that suits the model.

    Args:
        params: Parameters or parameter groups.
        lr: Peak learning rate; `auto` for one that suits the model's size, whether adapters train, and what is
            learned: see the table in docs/tuning.md.
        betas: Decay rates of the first and second moment.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
        fused: Whether a step is a single pass over the weights; null for wherever torch supports it. It is five times
            as fast on the CPU.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Literal["auto"] = "auto",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 1e-6,
        fused: bool | None = None,
    ) -> None:
        self.has_automatic_rate = lr == "auto"
        lr = resolve_rate(lr)
        check_finite("model.optimizer", lr=lr, eps=eps, weight_decay=weight_decay)
        groups = list(params)
        if fused is None:
            tensors = [p for g in groups for p in (g["params"] if isinstance(g, dict) else [g])]
            fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in tensors)
        super().__init__(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)


class ProgressSchedule(torch.optim.lr_scheduler.LRScheduler, ABC):
    """Linear warm-up, then a decay to `min_factor`, over the whole run or in every round.

    It follows the run's progress instead of counting steps, because a round's number of pairs is known only after the
    round is prepared. The span is divided into equal slices, one an update, and an update has the rate at the middle of
    its slice: the first update is not wasted on a rate of 0.

    Args:
        optimizer: The optimizer.
        warmup: Share of the span that warms up, from 0 (none) to below 1.
        min_factor: The rate at the end, as a share of the peak rate.
        span: `run` for one warm-up and one decay over all rounds, `round` for one in every round.
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
        """The rate at `progress` (0..1 of the span), as a share of the peak rate."""
        if progress < self.warmup:
            return progress / self.warmup
        return self.min_factor + (1 - self.min_factor) * self.decay((progress - self.warmup) / (1 - self.warmup))

    @abstractmethod
    def decay(self, progress: float) -> float:
        """The share of the way from the peak rate to `min_factor` that is left, at `progress` (0..1) of the decay."""

    def follow(self, progress: Callable[[], tuple[float, float]]) -> None:
        """Get the next update's progress from `progress() -> (in the run, in the round)`, each 0..1."""
        self.progress = progress

    def refresh(self) -> None:
        """Set the optimizer's rates for the next update, once its progress is known."""
        for group, lr in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = lr

    def get_lr(self) -> list[float | torch.Tensor]:
        in_run, in_round = self.progress()
        factor = self.factor(min(1.0, in_run if self.span == "run" else in_round))
        return [base * factor for base in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """The state that training changes; settings come from the config."""
        settings = ("progress", "warmup", "min_factor", "span")
        return {k: v for k, v in super().state_dict().items() if k not in settings}


class WarmupCosine(ProgressSchedule):
    """Linear warm-up, then a cosine decay to `min_factor`, over the whole run or in every round.

    It follows the run's progress instead of counting steps, because a round's number of pairs is known only after the
    round is prepared. The span is divided into equal slices, one an update, and an update has the rate at the middle of
    its slice: the first update is not wasted on a rate of 0.

    Args:
        optimizer: The optimizer.
        warmup: Share of the span that warms up, from 0 (none) to below 1.
        min_factor: The rate at the end, as a share of the peak rate.
        span: `run` for one warm-up and one cosine over all rounds, `round` for one in every round.
    """

    def decay(self, progress: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * progress))


class WarmupLinear(ProgressSchedule):
    """Linear warm-up, then a linear decay to `min_factor`, over the whole run or in every round.

    It follows the run's progress as `WarmupCosine` does: an update has the rate at the middle of its slice of the span.

    Args:
        optimizer: The optimizer.
        warmup: Share of the span that warms up, from 0 (none) to below 1.
        min_factor: The rate at the end, as a share of the peak rate.
        span: `run` for one warm-up and one decay over all rounds, `round` for one in every round.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        warmup: float = 0.0,
        min_factor: float = 0.0,
        span: Literal["run", "round"] = "run",
    ) -> None:
        super().__init__(optimizer, warmup, min_factor, span)

    def decay(self, progress: float) -> float:
        return 1 - progress


def copy_state(optimizer: torch.optim.Optimizer) -> dict[Any, Any]:
    """A copy of an optimizer's state, for `reset_state`; empty for optimizers that make it in their first step."""
    return deepcopy(optimizer.state_dict()["state"])


def reset_state(optimizer: torch.optim.Optimizer, state: dict[Any, Any]) -> None:
    """Give an optimizer the state that `copy_state` has copied; hyperparameters stay."""
    optimizer.state.clear()
    if state:
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": deepcopy(state), "param_groups": groups})


def hyperparameters(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Hyperparameters of each parameter group; those of the config, if no checkpoint is restored yet."""
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def restore_hyperparameters(optimizer: torch.optim.Optimizer, scheduler: Any, settings: list[dict[str, Any]]) -> None:
    """Replace a checkpoint's hyperparameters by `settings`.

    A changed base rate scales the current one, so that schedules that compute each rate from the last one continue.
    """
    for group, wanted in zip(optimizer.param_groups, settings, strict=True):
        old, new = group.get("initial_lr"), wanted.get("initial_lr")
        if old is not None and new is not None and old != new:
            group["lr"] = group["lr"] * new / old if old else new
        group.update({k: v for k, v in wanted.items() if k != "lr"})
    if hasattr(scheduler, "base_lrs"):
        scheduler.base_lrs = [wanted.get("initial_lr", wanted["lr"]) for wanted in settings]


def add_empty_state(optimizer: torch.optim.Optimizer, parameters: Iterable[torch.Tensor]) -> None:
    """Give some parameters the state of an optimizer that has made no step yet; nothing else changes.

    Sharded checkpoints must hold the state of all parameters, also of those that have not trained yet.
    """
    missing = {id(parameter) for parameter in parameters if parameter not in optimizer.state}
    if not missing:
        return
    everything = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients, rates = [p.grad for p in everything], [group["lr"] for group in optimizer.param_groups]
    for parameter in everything:
        parameter.grad = torch.zeros_like(parameter) if id(parameter) in missing else None
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for parameter, gradient in zip(everything, gradients, strict=True):
        parameter.grad = gradient
        if id(parameter) in missing:
            for value in optimizer.state[parameter].values():
                if isinstance(value, torch.Tensor):
                    value.zero_()  # also the number of steps
