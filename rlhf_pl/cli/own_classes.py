"""Replaces Lightning's classes in a config by this package's subclasses, before they are instantiated."""

from importlib import import_module
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from rlhf_pl.distributed.strategies import CPUFSDPStrategy, FSDP2Strategy
from rlhf_pl.trainer.run_loggers import RunCSVLogger, RunLogger

_LOGGERS: dict[type, type] = {TensorBoardLogger: RunLogger, CSVLogger: RunCSVLogger}
RUN_DIRECTORY = ""  # a logger's `save_dir` where the config gives none
_SIZES = ("data_parallel_size", "tensor_parallel_size")


def on_gpu(accelerator: Any) -> bool:
    """Whether a Trainer with this `accelerator` will use GPUs."""
    return accelerator not in ("cpu",) and torch.cuda.is_available()


def replace_classes(config: Namespace) -> Namespace:
    """A copy of a parsed config whose Trainer has the strategies and loggers that runs need, with the same arguments.

    On a CPU, CPUFSDPStrategy replaces `fsdp` and FSDPStrategy. FSDP2Strategy replaces a ModelParallelStrategy without
    sizes, which would use tensor parallelism over the devices of a node. CSVLogger and TensorBoardLogger are replaced
    by subclasses that continue the files of earlier processes. Users' own subclasses are not replaced.
    """
    config = config.clone()
    trainer = config.get(str(config.get("subcommand")), config).get("trainer")
    if trainer is not None:
        trainer["strategy"] = _strategy(trainer["strategy"], on_gpu(trainer["accelerator"]))
        loggers = trainer["logger"]
        trainer["logger"] = list(map(_logger, loggers)) if isinstance(loggers, list) else _logger(loggers)
    return config


def fill_save_dirs(trainer: Namespace) -> None:
    """Let loggers whose `save_dir` the config does not give write to the run directory.

    Args:
        trainer: The Trainer's part of a parsed config, which is changed.
    """
    for logger in trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]:
        options = logger.get("init_args") if isinstance(logger, Namespace) else None
        if options is not None and options.get("save_dir") == RUN_DIRECTORY:
            options["save_dir"] = trainer.default_root_dir


def leave_out_rollout(config: Namespace) -> Namespace:
    """A config without its sampler and reward where `--rounds_from` makes them useless, so that none is built."""
    fit = config.get(str(config.get("subcommand")), config)
    rollout = fit.get("rollout")
    if fit.get("rounds_from") is not None and rollout is not None and not rollout.get("evaluate"):
        rollout["reward"] = None
        for name in ("sampler", "refill"):  # their defaults have no effect
            if name in rollout:
                del rollout[name]
    return config


def _strategy(given: Any, gpu: bool) -> Any:
    kind = _kind(given)
    sizes = given.get("init_args", {}) if kind is ModelParallelStrategy else {}
    if kind is ModelParallelStrategy and all(sizes.get(name, "auto") == "auto" for name in _SIZES):
        return _replace_class(given, FSDP2Strategy)
    if gpu:
        return given
    if given in ("fsdp", "fsdp_cpu_offload"):
        return _replace_class(Namespace(init_args=Namespace()), CPUFSDPStrategy)
    return _replace_class(given, CPUFSDPStrategy) if kind is FSDPStrategy else given


def _logger(given: Any) -> Any:
    kind = _kind(given)
    return _replace_class(given, _LOGGERS[kind]) if kind in _LOGGERS else given


def _kind(given: Any) -> Any:
    """The class that a part of a config names, or None."""
    if not isinstance(given, Namespace) or "class_path" not in given:
        return None
    module, _, name = given["class_path"].rpartition(".")
    return getattr(import_module(module), name)


def _replace_class(given: Namespace, own: type) -> Namespace:
    given = given.clone()
    given["class_path"] = f"{own.__module__}.{own.__qualname__}"
    return given
