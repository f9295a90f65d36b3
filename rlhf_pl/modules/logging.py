"""Logging of the modules: once an update, over all its micro-batches and ranks."""

import math
from collections.abc import Mapping

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from rlhf_pl.distributed.ranks import Ranks

_LARGEST_K2 = 1e9


class Means:
    """Weighted running means by name, over all values since the last reset and over all ranks.

    `last_weights` holds the total weight of each mean at the last `compute_and_reset`.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  # (weighted sum, weight) by name
        self.last_weights: dict[str, float] = {}

    def add(self, weights: Tensor | float = 1.0, **values: Tensor) -> None:
        """Add values, tensors of any shape, all with the same weights. A NaN makes the mean NaN.

        The means of torchmetrics check for NaNs, which makes the host wait for a GPU.
        """
        for name, value in values.items():
            value = value.detach().float()
            if isinstance(weights, Tensor):
                weight = weights.float().expand(value.shape)
            else:
                weight = torch.full_like(value, weights)
            added = torch.stack([(value * weight).sum(), weight.sum()])
            self._sums[name] = self._sums[name] + added if name in self._sums else added

    def compute_and_reset(self, prefix: str, ranks: Ranks) -> dict[str, float]:
        """Return the means as `prefix/name`, and reset them. All ranks must call it together."""
        read = torch.stack(list(self._sums.values())).tolist() if self._sums else []  # all at once
        own = {name: (total, weight) for name, (total, weight) in zip(self._sums, read, strict=True)}
        self._sums = {name: torch.zeros_like(sums) for name, sums in self._sums.items()}
        sums: dict[str, tuple[float, float]] = {}  # weighted sum, weight
        for of_rank in ranks.all_gather(own):
            for name, (total, weight) in of_rank.items():
                before = sums.get(name, (0.0, 0.0))
                sums[name] = (before[0] + total, before[1] + weight)
        self.last_weights = {name: weight for name, (_, weight) in sums.items()}
        return {f"{prefix}/{name}": total / weight if weight else math.nan for name, (total, weight) in sums.items()}


def with_variance(metrics: dict[str, float], name: str) -> dict[str, float]:
    """Replace the moments of some values by their mean and variance.

    Args:
        metrics: With `name`, the mean of the values minus 1, and `name_square`, the mean of its square.
        name: Name of the values.

    Returns:
        `metrics` with `name_mean` and `name_var` (of the population: divided by the number of values) instead.
    """
    if name not in metrics:
        return metrics
    shift, square = metrics[name], metrics[f"{name}_square"]
    rest = {key: value for key, value in metrics.items() if key not in (name, f"{name}_square")}
    return {**rest, f"{name}_mean": 1 + shift, f"{name}_var": square - shift * shift}


def k2_of_ratios(metrics: Mapping[str, float]) -> float:
    """Half the mean square of pi / pi_old - 1 of an update, close to a small KL; 0 if it is not known."""
    if "train/ratio_mean" not in metrics:
        return 0.0
    k2 = (metrics["train/ratio_var"] + (metrics["train/ratio_mean"] - 1) ** 2) / 2
    return k2 if k2 < _LARGEST_K2 else _LARGEST_K2  # also for NaN, where ratios overflow


def is_update(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether the optimizer steps after this micro-batch."""
    return batch_idx + 1 == trainer.num_training_batches or (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def publish_metrics(trainer: L.Trainer, metrics: dict[str, float], step: int) -> None:
    """Log metrics outside of the hooks where `self.log` works, and let callbacks monitor them."""
    expose_metrics(trainer, metrics)
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=step)


def log_histograms(trainer: L.Trainer, values: dict[str, Tensor]) -> None:
    """Log histograms of values, by name, to the run's TensorBoard loggers."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            for name, numbers in values.items():
                logger.experiment.add_histogram(name, numbers, max(0, trainer.global_step - 1))


def expose_metrics(trainer: L.Trainer, metrics: dict[str, float]) -> None:
    """Let callbacks monitor metrics that are already logged."""
    trainer.callback_metrics.update({name: torch.tensor(float(value)) for name, value in metrics.items()})


def log_update(module: L.LightningModule, metrics: dict[str, float]) -> None:
    """Log an update's metrics and its learning rate.

    They go directly to the loggers: Lightning would log after `on_train_batch_end`, so a checkpoint written there would
    be ahead of the logs.
    """
    trainer = module.trainer
    metrics["train/lr"] = trainer.optimizers[0].param_groups[0]["lr"]
    module.log_dict(metrics, on_step=True, on_epoch=False, logger=False)
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    if every > 0 and (trainer.global_step + 1) % every == 0:
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
