"""Refuses Trainer options, callbacks and plugins that can't work here, before any model loads."""

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from rlhf_pl.distributed.strategies import is_sharded
from rlhf_pl.models.compute import HALF
from rlhf_pl.models.lora import base_dtype
from rlhf_pl.utils.errors import InputError

_TRIAL_HINT = (
    "For a short trial use a separate run directory (--trainer.default_root_dir DIR), --trainer.max_epochs 1 and a few "
    "rows, for rounds --data.prompts_per_round 8."
)
REFUSED_CALLBACKS: dict[type[L.Callback], str] = {
    callbacks.StochasticWeightAveraging: "it would replace the learning-rate schedule, and its averages would not "
    "reach the exported model. Use lightning.pytorch.callbacks.EMAWeightAveraging or WeightAveraging.",
    callbacks.LearningRateFinder: "its trials would train, and their updates would count. Set --model.optimizer.lr; "
    "`train/kl` shows how far an update moves the policy.",
    callbacks.BatchSizeFinder: "the batch size is part of an update's definition. Set data.max_tokens_per_batch, which "
    "divides an update by its tokens; `rlhf-pl plan` computes what fits.",
    callbacks.GradientAccumulationScheduler: "an update's micro-batches are weighted for the same accumulation in all "
    "epochs. Set trainer.accumulate_grad_batches.",
    callbacks.BackboneFinetuning: "the modules here have no `backbone` layer, and their optimizer is made once a run. "
    "Train a part of the weights with model.trainable_layers or model.lora.",
    callbacks.ModelPruning: "masked weights are neither synced to samplers nor exported. Leave it out.",
}


def refuse_options(config: Mapping[str, Any], in_rounds: bool) -> None:
    """Refuse options of a config before the Trainer, which would change their values, is made.

    Raises:
        InputError: Names the option and the remedy.
    """
    if config["fast_dev_run"]:
        raise InputError(f"`trainer.fast_dev_run` would train without resume points and logs. {_TRIAL_HINT}")
    if config["barebones"]:
        raise InputError("`trainer.barebones` disables the metrics and resume points that runs need. Leave it out.")
    accelerator = config.get("accelerator")
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available() and not torch.backends.mps.is_available():
        raise InputError(
            f"`trainer.accelerator` is {accelerator}, and this machine has no GPU that PyTorch can use. Run this on a "
            "machine with GPUs; `rlhf-pl plan` with the same options says what it needs. For a trial with a small "
            "model on this machine: --trainer.accelerator cpu --trainer.devices 1 --trainer.strategy auto."
        )
    if in_rounds and config["num_sanity_val_steps"]:
        raise InputError(
            f"`trainer.num_sanity_val_steps` is {config['num_sanity_val_steps']}, but held-out pairs exist only after "
            "the first round is made. Set it to 0; rewards are tried before any training."
        )


def check_trainer(trainer: L.Trainer, in_rounds: bool) -> None:
    """Refuse options, callbacks and plugins of a Trainer.

    Args:
        trainer: The Trainer, set up without a model.
        in_rounds: Whether an epoch is a round, whose pairs are made when it starts.

    Raises:
        InputError: Names the option and the remedy.
    """
    options: Any = trainer
    unit = "round" if in_rounds else "epoch"
    given = {"fast_dev_run": options.fast_dev_run, "barebones": options.barebones, "num_sanity_val_steps": 0}
    refuse_options(given, in_rounds)
    if options.overfit_batches:
        raise InputError(
            f"`trainer.overfit_batches` is {options.overfit_batches}, but every {unit} has its own order, so its first "
            "batches differ. Give a file with a few rows instead, and more epochs."
        )
    if options.accumulate_grad_batches < 1:
        raise InputError(
            f"`trainer.accumulate_grad_batches` is {options.accumulate_grad_batches}; it must be 1 or more."
        )
    if options.limit_train_batches == 0:
        raise InputError(
            "`trainer.limit_train_batches` is 0, so nothing would be trained. Leave it out, or set it to 1."
        )
    if options.reload_dataloaders_every_n_epochs not in (0, 1):
        raise InputError(
            f"`trainer.reload_dataloaders_every_n_epochs` is {options.reload_dataloaders_every_n_epochs}, but every "
            f"{unit} has its own pairs or order. Set it to 1."
        )
    # overrides Lightning's default in Python: the dataloaders here already give every rank its own part
    options._accelerator_connector.use_distributed_sampler = False
    every = getattr(options, "val_check_interval", None)  # missing if it is a time
    if in_rounds and isinstance(every, int) and options.check_val_every_n_epoch is not None:
        raise InputError(
            f"`trainer.val_check_interval` is {every} micro-batches, but their number in a round is known only after "
            "its pairs are made. Give a share of the round, for example 0.5, or count over rounds with "
            "--trainer.check_val_every_n_epoch null."
        )
    if isinstance(trainer.strategy.checkpoint_io, AsyncCheckpointIO):
        raise InputError(
            "`trainer.plugins`: AsyncCheckpointIO writes checkpoints while the run continues, but a resume point must "
            "be complete before the next step. Leave it out."
        )
    for callback in options.callbacks:
        _check_callback(trainer, callback)


def _check_callback(trainer: L.Trainer, callback: L.Callback) -> None:
    for kind, why in REFUSED_CALLBACKS.items():
        if isinstance(callback, kind):
            raise InputError(f"`trainer.callbacks`: {type(callback).__name__} does not work here: {why}")
    if not isinstance(callback, callbacks.WeightAveraging):
        return
    name = type(callback).__name__
    if is_sharded(trainer):
        raise InputError(
            f"`trainer.callbacks`: {name} needs whole weights on every device, but {type(trainer.strategy).__name__} "
            "shards them. Leave it out, or use --trainer.strategy ddp."
        )
    if base_dtype(getattr(trainer.lightning_module, "lora", None)) is not None:
        raise InputError(
            f"`trainer.callbacks`: {name} can't average the 4-bit weights of `model.lora.base_dtype`. Set that to null."
        )


def check_precision(trainer: L.Trainer) -> None:
    """Refuse precisions that cast more than the computation.

    Raises:
        InputError: The precision is refused; names the ones to use instead.
    """
    if str(trainer.precision) not in ("32-true", *HALF):
        raise InputError(
            f"`trainer.precision`: {trainer.precision!r} casts positions and log-probs too, which moves a "
            "sequence's log-prob by nats. For half-precision weights use `--trainer.precision 32-true` with "
            "`--model.dtype bfloat16`; for half-precision compute on float32 weights use `bf16-mixed`."
        )
