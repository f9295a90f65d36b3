"""Metrics that callbacks and schedules follow: each must be one that the run has, checked before any model loads."""

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint, LearningRateMonitor

from rlhf_pl.modules.base import TrainedModule
from rlhf_pl.utils.errors import InputError


def check_monitors(
    trainer: L.Trainer, module: L.LightningModule, validates: bool, others: Sequence[str], lacking: str
) -> None:
    """Refuse a monitored metric that the run will not have.

    Where a class of the user's own takes part, it may log anything, and only Lightning can tell.

    Args:
        trainer: With its callbacks.
        module: What trains.
        validates: Whether there are held-out rows to validate on, which `val_metrics` come from.
        others: Metrics that do not come from the module; those that end in a slash stand for all that begin so.
        lacking: What to set for metrics of held-out data that are not there.

    Raises:
        InputError: Names the callback, the metric and those that there are.
    """
    everything: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if not isinstance(module, TrainedModule) or not all(_is_known(part) for part in (module, *everything)):
        return
    known = [*module.train_metrics, *(module.val_metrics if validates else ()), *others]
    if any(isinstance(callback, LearningRateMonitor) for callback in everything):
        known.append("lr-")
    for owner, name, also in _monitored(module, everything):
        if name in (*known, *also) or any(name.startswith(start) for start in known if start[-1] in "/-"):
            continue
        held_out = f" {lacking}" if name.startswith("val/") and lacking else ""
        near = get_close_matches(name, known, 3, 0.5)
        listed = ", ".join(dict.fromkeys([*near, *known]))
        raise InputError(f"{owner} monitors {name!r}, which this run does not have.{held_out} There are: {listed}.")


def _monitored(module: TrainedModule, everything: Sequence[Any]) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """(who, metric, names that only it knows)."""
    if module.optimization.monitor is not None:
        yield "`model.lr_scheduler`: ReduceLROnPlateau", module.optimization.monitor, ()
    for callback in everything:
        name = getattr(callback, "monitor", None)
        if isinstance(name, str):
            own = ("epoch", "step") if isinstance(callback, Checkpoint) else ()
            yield f"`trainer.callbacks`: {type(callback).__name__}", name, own


def _is_known(part: object) -> bool:
    return type(part).__module__.split(".")[0] in ("lightning", "rlhf_pl")
