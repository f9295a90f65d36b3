"""Ends a run whose loss, gradient norm or weights are not finite, before any of it is saved."""

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.tensor import DTensor

from rlhf_pl.checkpointing.divergence import (
    make_diverged_error,
    refuse_diverged_moments,
    refuse_diverged_weights,
    refuse_on_any_rank,
)
from rlhf_pl.modules.logging import is_update
from rlhf_pl.utils.console import warn
from rlhf_pl.utils.finite import find_first_nonfinite

# of a gradient scaler, which starts at 2^16 and is halved whenever gradients overflow
MIN_SCALE = 2.0**-126
_SIGNS = (
    "the loss is not finite",
    "the norm of the gradients is not finite",
    "gradients are not finite at any scale, so every update is skipped",
)


class DivergenceCheck(L.Callback):
    """Ends a run that has diverged; the last good checkpoint stays intact. Every run has it.

    It checks the loss of every micro-batch and, where clipping computes it, the norm of the gradients. Their signs of
    divergence are collected on the device and read one update later, so that the host never waits for a GPU. Infinite
    gradients under 16-mixed are normal as long as the scaler finds a scale for them. The weights and the optimizer's
    moments are checked once before each save.
    """

    def __init__(self) -> None:
        self._signs: Tensor | None = None  # of the update in progress, on the device: 1 for each of `_SIGNS` seen
        self._sent: tuple[int, Tensor, Any] | None = None  # (update, signs on the host, event of their arrival)
        self._checked = -1  # the last update after which the weights were checked
        self._update = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Become the first callback, so that no other one uses values that are not finite; check before every save."""
        run: Any = trainer
        run.callbacks = [self, *(callback for callback in run.callbacks if callback is not self)]
        if stage == "fit":
            vars(run.strategy).pop("save_checkpoint", None)  # left by a fit that has failed
            save = run.strategy.save_checkpoint

            def checked(checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
                self._refuse(trainer, pl_module)
                _refuse_averages(trainer, checkpoint)
                save(checkpoint, *args, **kwargs)

            run.strategy.save_checkpoint = checked

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        vars(trainer.strategy).pop("save_checkpoint", None)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the weights that training starts from, also those of a checkpoint."""
        self._signs, self._sent, self._checked = None, None, -1
        self._refuse(trainer, pl_module)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, idx: int) -> None:
        self._update = trainer.global_step + 1

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if not isinstance(loss, Tensor):  # no batch, or another module's return value
            return
        ends_update = is_update(trainer, batch_idx)
        norm = getattr(pl_module, "gradient_norm", None) if ends_update else None
        scale = getattr(getattr(trainer.precision_plugin, "scaler", None), "_scale", None)
        seen = torch.stack([_not_finite(loss), _not_finite(norm, loss), _vanished(scale, loss)])
        self._signs = seen if self._signs is None else torch.maximum(self._signs, seen)
        if ends_update:
            self._read(trainer)
            self._send(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check before validation: metrics of values that are not finite mean nothing, and some fail on them."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._refuse(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check before the round counts as trained."""
        self._refuse(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._refuse(trainer, pl_module)
        skipped = getattr(getattr(pl_module, "optimization", None), "skipped", None)
        if trainer.is_global_zero and trainer.global_step == 0 and skipped is not None and skipped.in_run:
            warn(
                f"No update was made, so the model is unchanged: gradients overflowed float16 in all {skipped.in_run} "
                "steps, and the gradient scaler skipped them. It halves its scale each time: train for longer, or "
                "use --trainer.precision bf16-mixed."
            )

    def _refuse(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Raise if anything up to the current update is not finite; all ranks call it together."""
        self._read_all(trainer)
        if self._checked != trainer.global_step:
            refuse_diverged_weights(trainer, module)
            refuse_diverged_moments(trainer, module)
            self._checked = trainer.global_step

    def _read_all(self, trainer: L.Trainer) -> None:
        self._read(trainer)
        if self._signs is not None:
            self._send(trainer)
        self._read(trainer)

    def _send(self, trainer: L.Trainer) -> None:
        """Start to copy an update's signs, reduced over all ranks, to the host."""
        assert self._signs is not None
        if trainer.world_size > 1:
            dist.all_reduce(self._signs, op=dist.ReduceOp.MAX)  # on GPUs asynchronous: no rank waits here
        event = None
        signs = self._signs.to("cpu", non_blocking=self._signs.is_cuda)
        if self._signs.is_cuda:
            event = torch.cuda.Event()
            event.record()
        self._sent, self._signs = (self._update, signs, event), None

    def _read(self, trainer: L.Trainer) -> None:
        sent, self._sent = self._sent, None
        if sent is None:
            return
        update, signs, event = sent
        if event is not None:
            event.synchronize()
        seen = [text for text, sign in zip(_SIGNS, signs.tolist(), strict=True) if sign]
        if seen:
            raise make_diverged_error(trainer, seen[0], update)


def _not_finite(value: Any, like: Tensor | None = None) -> Tensor:
    """1 for a tensor with a value that is not finite, 0 for None; shape (), on the device of `like`, else its own."""
    if value is None:
        assert like is not None
        return torch.zeros((), device=like.device)
    value = value.full_tensor() if isinstance(value, DTensor) else value
    found = (~value.detach().isfinite()).any().float()
    return found if like is None else found.to(like.device, non_blocking=True)


def _vanished(scale: Tensor | None, like: Tensor) -> Tensor:
    """1 if a gradient scaler has found no scale at which gradients are finite; shape (), on the device of `like`."""
    if scale is None:
        return torch.zeros((), device=like.device)
    return (scale < MIN_SCALE).float().reshape(()).to(like.device, non_blocking=True)


def _refuse_averages(trainer: L.Trainer, checkpoint: Mapping[str, Any]) -> None:
    """Check the averaged weights that Lightning's WeightAveraging puts into a checkpoint's `state_dict`."""
    if "current_model_state" in checkpoint:
        name = find_first_nonfinite(checkpoint["state_dict"].items())
        refuse_on_any_rank(trainer, f"the averaged weights `{name}` are not finite" if name else "")
