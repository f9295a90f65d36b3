"""Records every update of a run: the weights before it and the gradient that the optimizer gets."""

from dataclasses import dataclass
from typing import Any, ClassVar

import lightning as L
from torch import Tensor


@dataclass
class RecordedUpdate:
    """Weights before an update and its gradient, by parameter."""

    weights: dict[str, Tensor]
    gradient: dict[str, Tensor]


class UpdateRecorder(L.Callback):
    """Keeps the updates of the last run, in `updates`: the command line creates the callback itself."""

    updates: ClassVar[list[RecordedUpdate]] = []

    def on_fit_start(self, trainer: L.Trainer, module: Any) -> None:
        self.updates.clear()

    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
        found = dict(module.policy.lm.named_parameters())
        weights = {name: p.detach().clone() for name, p in found.items()}
        gradient = {name: p.grad.clone() for name, p in found.items() if p.grad is not None}
        self.updates.append(RecordedUpdate(weights, gradient))
