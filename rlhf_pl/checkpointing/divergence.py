"""Weights that are not finite: refused before they are saved, exported or sampled from."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import lightning as L
from torch import Tensor
from torch.distributed.tensor import DTensor

from rlhf_pl.checkpointing.checkpoints import is_sharded_checkpoint, is_whole, progress_of_files, read_weights
from rlhf_pl.distributed.ranks import ranks_of
from rlhf_pl.models.lora import unwrapped_name
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.finite import first_not_finite, not_finite

# float16's largest number. Weights of language models are below 1,000; those that a learning rate has thrown beyond
# this may still give finite numbers, such as the same logits for every token.
LARGEST_WEIGHT = 65504.0
# of a module the tensors that were beyond it, and the buffers that were not finite, when it was looked at first
_born_so: "WeakKeyDictionary[L.LightningModule, set[str]]" = WeakKeyDictionary()


class DivergedError(InputError):
    """Training has diverged: a loss, a gradient norm or weights are not finite."""


def diverged(trainer: L.Trainer, what: str, update: int | None = None) -> DivergedError:
    """The error that ends such a run.

    Args:
        trainer: Of the run.
        what: A clause that says what is not finite.
        update: At which update that was so; None for the last one.
    """
    update = trainer.global_step if update is None else update
    epochs: Any = trainer.fit_loop.epoch_progress.current
    has_eta = hasattr(getattr(trainer.lightning_module, "loss", None), "eta")
    lower = "`model.optimizer.lr`, or `model.loss.eta`" if has_eta else "`model.optimizer.lr`"
    rewards = f", look at the rewards (`rlhf-pl rounds {trainer.default_root_dir}`)" if has_eta else ""
    return DivergedError(
        f"Training has diverged: at update {update}, round (epoch) {max(1, epochs.started)}, {what}. Nothing of that "
        f"is saved or exported. {_way_back(trainer)}. Before that lower {lower}{rewards}, clip "
        "gradients (--trainer.gradient_clip_val 1), or take a wider dtype (--model.dtype float32, --trainer.precision "
        "bf16-mixed)."
    )


def _way_back(trainer: L.Trainer) -> str:
    progress = progress_of_files(trainer.default_root_dir)
    files = list(progress)
    good = next((file for file in reversed(files) if _is_good(trainer, file, progress[file].global_step)), None)
    if not files:
        return "No checkpoint was written before; the same command trains anew"
    if good is None:
        return (
            f"No checkpoint in {files[-1].parent} holds finite weights; remove them, and the same command trains anew"
        )
    if good == files[-1]:
        return f"The last good checkpoint is intact, and the same command goes on from there or before: {good}"
    return f"Newer checkpoints hold such weights; the last good one is intact: go on from it with --ckpt_path {good}"


def _is_good(trainer: L.Trainer, file: Path, step: int) -> bool:
    """Whether a checkpoint holds finite weights; one in parts is taken to, unless the run has just begun from it."""
    if is_sharded_checkpoint(file):
        restored = trainer.ckpt_path is not None and Path(trainer.ckpt_path).resolve() == file.resolve()
        return not (restored and step == trainer.global_step)
    return is_whole(file) and not first_not_finite(read_weights(file, "", {}).items())


def refuse_diverged_weights(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Look at all of a module's weights that train, and its buffers, before they are saved, exported or sampled from.

    Every rank looks at its own part. All of them must call it together, and all raise if one finds something.

    Raises:
        DivergedError: Names the tensor that holds a NaN or an infinity, or a weight beyond `LARGEST_WEIGHT`. Weights
            that were beyond it at the first look may stay so, and buffers that held infinities or NaN.
    """
    born_so = _born_so.get(module)
    if born_so is None:  # before it trains: what a model comes with has not diverged
        born_so = {*not_finite(_weights(module), LARGEST_WEIGHT), *not_finite(_buffers(module))}
        _born_so[module] = born_so
    name = (
        first_not_finite((n, t) for n, t in _weights(module) if n in born_so)
        or first_not_finite(((n, t) for n, t in _weights(module) if n not in born_so), LARGEST_WEIGHT)
        or first_not_finite((n, t) for n, t in _buffers(module) if n not in born_so)
    )
    refuse_on_any_rank(
        trainer, f"`{name}` holds numbers that are not finite, or beyond {LARGEST_WEIGHT:g}" if name else ""
    )


def refuse_diverged_moments(trainer: L.Trainer, module: L.LightningModule) -> None:
    """The same for what optimizers keep of each weight: an infinite moment holds its weight fast from then on."""
    name = first_not_finite(_moments(trainer, module))
    refuse_on_any_rank(trainer, f"the optimizer's `{name}` holds numbers that are not finite" if name else "")


def refuse_on_any_rank(trainer: L.Trainer, found: str) -> None:
    """Raise DivergedError on all ranks if one of them has found something: a clause that says what is not finite."""
    if what := next(filter(None, ranks_of(trainer).all_gather(found)), ""):
        raise diverged(trainer, what)


def _weights(module: L.LightningModule) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in module.named_parameters():
        if tensor.requires_grad:
            yield unwrapped_name(name), _own(tensor.detach())


def _buffers(module: L.LightningModule) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in module.named_buffers():
        if tensor.is_floating_point() and not tensor.is_meta:
            # masks hold -inf, and what keeps the best of something inf
            yield unwrapped_name(name), _own(tensor).clamp(min=-1, max=None if tensor.dim() else 1)


def _moments(trainer: L.Trainer, module: L.LightningModule) -> Iterator[tuple[str, Tensor]]:
    names = {id(parameter): unwrapped_name(name) for name, parameter in module.named_parameters()}
    for optimizer in trainer.optimizers:
        for parameter, state in optimizer.state.items():
            for kind, tensor in state.items():
                if isinstance(tensor, Tensor) and tensor.dim():
                    yield f"{kind} of {names.get(id(parameter), 'a weight')}", _own(tensor)


def _own(tensor: Any) -> Tensor:
    """This rank's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
