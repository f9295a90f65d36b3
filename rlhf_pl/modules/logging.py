"""What the modules log, and when: once an update, over all its micro-batches and ranks."""

import lightning as L
from torch import Tensor
from torchmetrics import MeanMetric


class Means:
    """Running means by name, over everything since they were last taken, and over ranks."""

    def __init__(self) -> None:
        self._means: dict[str, MeanMetric] = {}

    def add(self, weights: Tensor | float = 1.0, **values: Tensor) -> None:
        """Add values, each a tensor of any shape, all weighted alike."""
        for name, value in values.items():
            if name not in self._means:
                self._means[name] = MeanMetric().to(value.device)
            self._means[name].update(value.detach(), weights)

    def take(self, prefix: str) -> dict[str, float]:
        """The means as `prefix/name`; they begin anew."""
        taken = {f"{prefix}/{name}": float(mean.compute()) for name, mean in self._means.items()}
        for mean in self._means.values():
            mean.reset()
        return taken


def is_update(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether the optimizer steps after this micro-batch."""
    return batch_idx + 1 == trainer.num_training_batches or (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def log_update(module: L.LightningModule, metrics: dict[str, float]) -> None:
    """Log an update's metrics and its learning rate.

    Straight to the loggers: Lightning would log after `on_train_batch_end`, and a checkpoint written there would be
    ahead of the logs.
    """
    trainer = module.trainer
    metrics["train/lr"] = trainer.optimizers[0].param_groups[0]["lr"]
    module.log_dict(metrics, on_step=True, on_epoch=False, logger=False)
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    if every > 0 and (trainer.global_step + 1) % every == 0:
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
