"""Checks, before any model loads, that the run will have every metric that callbacks and schedules monitor."""

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint, LearningRateMonitor

from rlhf_pl.modules.base import TrainedModule
from rlhf_pl.utils.errors import InputError


def check_monitors(
    trainer: L.Trainer,
    module: L.LightningModule,
    validates: bool,
    others: Sequence[str],
    missing_hint: str,
    absent: Sequence[str] = (),
) -> None:
    """Refuse a monitored metric that the run will not have.

    Where the module or a callback is a user's class, which may log anything, only `absent` metrics are refused.

    Args:
        trainer: The run's Trainer, with its callbacks.
        module: The module that trains.
        validates: Whether the run has held-out rows to validate on, which give `val_metrics`.
        others: Metrics that do not come from the module; a name that ends in a slash is a prefix.
        missing_hint: What to set to get metrics of held-out data.
        absent: Metrics of this package that the run will not have, whatever users' classes log.

    Raises:
        InputError: A metric is unknown; names the callback, the metric and the available metrics.
    """
    everything: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if not isinstance(module, TrainedModule):
        return
    may_log_anything = not all(_is_known(part) for part in (module, *everything))
    known = [*module.train_metrics, *(module.val_metrics if validates else ()), *others]
    if any(isinstance(callback, LearningRateMonitor) for callback in everything):
        known.append("lr-")
    for owner, name, own in _monitored(module, everything):
        if name in (*known, *own) or any(name.startswith(start) for start in known if start[-1] in "/-"):
            continue
        if may_log_anything and name not in absent:
            continue
        hint = f" {missing_hint}" if name.startswith("val/") and missing_hint else ""
        similar = get_close_matches(name, known, 3, 0.5)
        listed = ", ".join(dict.fromkeys([*similar, *known]))
        raise InputError(f"{owner} monitors {name!r}, which this run does not have.{hint} Available: {listed}.")


def _monitored(module: TrainedModule, everything: Sequence[Any]) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Yield (owner, its metric, further metrics that only the owner has)."""
    if module.optimization.monitor is not None:
        yield "`model.lr_scheduler`: ReduceLROnPlateau", module.optimization.monitor, ()
    for callback in everything:
        name = getattr(callback, "monitor", None)
        if isinstance(name, str):
            own = ("epoch", "step") if isinstance(callback, Checkpoint) else ()
            yield f"`trainer.callbacks`: {type(callback).__name__}", name, own


def _is_known(part: object) -> bool:
    return type(part).__module__.split(".")[0] in ("lightning", "rlhf_pl")
