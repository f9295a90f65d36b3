"""Refuses weights that are not finite before they are saved, exported or sampled from."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import lightning as L
from torch import Tensor
from torch.distributed.tensor import DTensor

from rlhf_pl.algorithms.policy_loss import PolicyLoss
from rlhf_pl.algorithms.step_options import describe_smaller_steps
from rlhf_pl.checkpointing.checkpoints import find_resume_files, is_sharded_checkpoint, is_whole, read_weights
from rlhf_pl.distributed.ranks import ranks_of
from rlhf_pl.models.lora import unwrapped_name
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.finite import find_first_nonfinite, find_nonfinite

# Largest number of float16. Weights of language models are below 1,000; larger weights, from a too high learning rate,
# may still give finite outputs, such as the same logits for every token.
LARGEST_WEIGHT = 65504.0
# by module: tensors that were beyond it, and buffers that were not finite, at the first check
_initial_exceptions: "WeakKeyDictionary[L.LightningModule, set[str]]" = WeakKeyDictionary()


class DivergedError(InputError):
    """Training has diverged: a loss, a gradient norm or a weight is not finite."""


def make_diverged_error(trainer: L.Trainer, what: str, update: int | None = None) -> DivergedError:
    """The error that ends a diverged run.

    Args:
        trainer: The run's Trainer.
        what: A clause that names what is not finite.
        update: The optimizer update where it was detected; None for the last one.
    """
    update = trainer.global_step if update is None else update
    epochs: Any = trainer.fit_loop.epoch_progress.current
    loss = getattr(trainer.lightning_module, "loss", None)
    smaller = describe_smaller_steps(loss) if isinstance(loss, PolicyLoss) else ""
    options = f"`--model.optimizer.lr`, or {smaller}" if smaller else "`--model.optimizer.lr`"
    reads_rewards = isinstance(loss, PolicyLoss) and loss.needs_reward_values
    rewards = f", look at the rewards (`rlhf-pl rounds {trainer.default_root_dir}`)" if reads_rewards else ""
    return DivergedError(
        f"Training has diverged: at update {update}, round (epoch) {max(1, epochs.started)}, {what}. These "
        f"weights are not saved or exported. {_describe_recovery(trainer)}. First lower {options}{rewards}, clip "
        "gradients (--trainer.gradient_clip_val 1), or use a wider dtype (--model.dtype float32, --trainer.precision "
        "bf16-mixed)."
    )


def _describe_recovery(trainer: L.Trainer) -> str:
    progress = find_resume_files(trainer.default_root_dir)
    files = list(progress)
    intact = next((f for f in reversed(files) if _has_finite_weights(trainer, f, progress[f].global_step)), None)
    if not files:
        return "No checkpoint was written; run the same command again to train from the beginning"
    if intact is None:
        return (
            f"No checkpoint in {files[-1].parent} holds finite weights; remove them and run the same command again to "
            "train from the beginning"
        )
    if intact == files[-1]:
        return f"The last good checkpoint is intact; run the same command again to resume from it or earlier: {intact}"
    return f"Newer checkpoints hold such weights; the last good one is intact: resume with --ckpt_path {intact}"


def _has_finite_weights(trainer: L.Trainer, file: Path, step: int) -> bool:
    """Whether a checkpoint holds finite weights; a sharded one is assumed to, unless the run has just loaded it."""
    if is_sharded_checkpoint(file):
        is_loaded = trainer.ckpt_path is not None and Path(trainer.ckpt_path).resolve() == file.resolve()
        return not (is_loaded and step == trainer.global_step)
    return is_whole(file) and not find_first_nonfinite(read_weights(file, "", {}).items())


def refuse_diverged_weights(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Check a module's trainable weights and its buffers, before they are saved, exported or sampled from.

    Every rank checks its own part. All ranks must call it together, and all raise if one finds a problem.

    Raises:
        DivergedError: A tensor, named in the message, holds a NaN or an infinity, or a weight beyond `LARGEST_WEIGHT`.
            Weights that were beyond it at the first check may stay so, and buffers that held infinities or NaN.
    """
    exceptions = _initial_exceptions.get(module)
    if exceptions is None:  # before training: the model's initial values have not diverged
        exceptions = {*find_nonfinite(_weights(module), LARGEST_WEIGHT), *find_nonfinite(_buffers(module))}
        _initial_exceptions[module] = exceptions
    name = (
        find_first_nonfinite((n, t) for n, t in _weights(module) if n in exceptions)
        or find_first_nonfinite(((n, t) for n, t in _weights(module) if n not in exceptions), LARGEST_WEIGHT)
        or find_first_nonfinite((n, t) for n, t in _buffers(module) if n not in exceptions)
    )
    refuse_on_any_rank(
        trainer, f"`{name}` holds numbers that are not finite, or beyond {LARGEST_WEIGHT:g}" if name else ""
    )


def refuse_diverged_moments(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Check the optimizers' moments in the same way: an infinite moment stops all later updates of its weight."""
    name = find_first_nonfinite(_moments(trainer, module))
    refuse_on_any_rank(trainer, f"the optimizer's `{name}` holds numbers that are not finite" if name else "")


def refuse_on_any_rank(trainer: L.Trainer, found: str) -> None:
    """Raise DivergedError on all ranks if one of them has found a problem.

    Args:
        trainer: The run's Trainer.
        found: A clause that names what is not finite on this rank; empty if everything is.
    """
    if what := next(filter(None, ranks_of(trainer).all_gather(found)), ""):
        raise make_diverged_error(trainer, what)


def _weights(module: L.LightningModule) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in module.named_parameters():
        if tensor.requires_grad:
            yield unwrapped_name(name), _local_part(tensor.detach())


def _buffers(module: L.LightningModule) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in module.named_buffers():
        if tensor.is_floating_point() and not tensor.is_meta:
            # masks hold -inf, and trackers of a best value start at inf
            yield unwrapped_name(name), _local_part(tensor).clamp(min=-1, max=None if tensor.dim() else 1)


def _moments(trainer: L.Trainer, module: L.LightningModule) -> Iterator[tuple[str, Tensor]]:
    names = {id(parameter): unwrapped_name(name) for name, parameter in module.named_parameters()}
    for optimizer in trainer.optimizers:
        for parameter, state in optimizer.state.items():
            for kind, tensor in state.items():
                if isinstance(tensor, Tensor) and tensor.dim():
                    yield f"{kind} of {names.get(id(parameter), 'a weight')}", _local_part(tensor)


def _local_part(tensor: Any) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
