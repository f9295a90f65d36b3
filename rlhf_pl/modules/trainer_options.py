"""Trainer options, callbacks and plugins that can't mean here what they say: refused before any model loads."""

from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch import callbacks
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from rlhf_pl.distributed.strategies import is_sharded
from rlhf_pl.models.lora import base_dtype
from rlhf_pl.utils.errors import InputError

_SHORT = (
    "For a short trial give a run directory of its own (--trainer.default_root_dir DIR), --trainer.max_epochs 1 and a "
    "few rows, for rounds --data.prompts_per_round 8."
)
REFUSED_CALLBACKS: dict[type[L.Callback], str] = {
    callbacks.StochasticWeightAveraging: "it would replace the learning-rate schedule, and its averages would not "
    "reach the exported model. Take lightning.pytorch.callbacks.EMAWeightAveraging or WeightAveraging.",
    callbacks.LearningRateFinder: "it would train for its trials, and the updates would count. Set "
    "model.optimizer.lr; `train/kl` shows how far an update goes.",
    callbacks.BatchSizeFinder: "batch sizes decide what an update is. Set data.max_tokens_per_batch, which divides an "
    "update by its tokens; `rlhf-pl plan` says what fits.",
    callbacks.GradientAccumulationScheduler: "an update's micro-batches are weighted for one accumulation in all "
    "epochs. Set trainer.accumulate_grad_batches.",
    callbacks.BackboneFinetuning: "the modules here have no `backbone` layer, and their optimizer is made for a run. "
    "Train a part of the weights by model.trainable_layers or model.lora.",
    callbacks.ModelPruning: "masked weights are neither synced to samplers nor exported. Leave it out.",
}


def refuse_options(config: Mapping[str, Any], in_rounds: bool) -> None:
    """Refuse options of a config before there is a Trainer, which would change what they say.

    Raises:
        InputError: Names the option and says what to do instead.
    """
    if config["fast_dev_run"]:
        raise InputError(f"`trainer.fast_dev_run` would train without resume points and logs. {_SHORT}")
    if config["barebones"]:
        raise InputError("`trainer.barebones` takes away the metrics and resume points that runs need. Leave it out.")
    if in_rounds and config["num_sanity_val_steps"]:
        raise InputError(
            f"`trainer.num_sanity_val_steps` is {config['num_sanity_val_steps']}, but held-out pairs are there only "
            "once the first round is made. Set it to 0; rewards are tried before anything is trained."
        )


def check_trainer(trainer: L.Trainer, in_rounds: bool) -> None:
    """Refuse options by name.

    Args:
        trainer: Set up, without a model.
        in_rounds: Whether an epoch is a round, whose pairs are made when it begins.

    Raises:
        InputError: Names the option and says what to do instead.
    """
    options: Any = trainer
    what = "round" if in_rounds else "epoch"
    given = {"fast_dev_run": options.fast_dev_run, "barebones": options.barebones, "num_sanity_val_steps": 0}
    refuse_options(given, in_rounds)
    if options.overfit_batches:
        raise InputError(
            f"`trainer.overfit_batches` is {options.overfit_batches}, but every {what} has an order of its own, so its "
            "first batches are other ones. Give a file of a few rows instead, and more epochs."
        )
    if options.accumulate_grad_batches < 1:
        raise InputError(
            f"`trainer.accumulate_grad_batches` is {options.accumulate_grad_batches}; it must be 1 or more."
        )
    if options.limit_train_batches == 0:
        raise InputError("`trainer.limit_train_batches` is 0, so nothing would be trained. Leave it out, or give 1.")
    if options.reload_dataloaders_every_n_epochs not in (0, 1):
        raise InputError(
            f"`trainer.reload_dataloaders_every_n_epochs` is {options.reload_dataloaders_every_n_epochs}, but every "
            f"{what} has its own pairs or order. Set it to 1."
        )
    # Lightning's default in Python; the loaders here already give every rank its own part
    options._accelerator_connector.use_distributed_sampler = False
    every = getattr(options, "val_check_interval", None)  # not there where it is a time
    if in_rounds and isinstance(every, int) and options.check_val_every_n_epoch is not None:
        raise InputError(
            f"`trainer.val_check_interval` is {every} micro-batches, but how many a round has is "
            "known only once its pairs are made. Give a share of the round such as 0.5, or count over rounds with "
            "--trainer.check_val_every_n_epoch null."
        )
    if isinstance(trainer.strategy.checkpoint_io, AsyncCheckpointIO):
        raise InputError(
            "`trainer.plugins`: AsyncCheckpointIO writes checkpoints after the run has gone on, and a resume point "
            "must be whole before the next step. Leave it out."
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
            "shards them. Leave it out, or take --trainer.strategy ddp."
        )
    if base_dtype(getattr(trainer.lightning_module, "lora", None)) is not None:
        raise InputError(
            f"`trainer.callbacks`: {name} can't average the 4-bit weights of `model.lora.base_dtype`. Set that to null."
        )
