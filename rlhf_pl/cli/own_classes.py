"""Which of Lightning's classes that a config names our own subclasses stand in for, when they are made."""

from importlib import import_module
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from rlhf_pl.cli.run_loggers import RunCSVLogger, RunLogger
from rlhf_pl.distributed.strategies import CPUFSDPStrategy, FSDP2Strategy

_LOGGERS: dict[type, type] = {TensorBoardLogger: RunLogger, CSVLogger: RunCSVLogger}
_SIZES = ("data_parallel_size", "tensor_parallel_size")


def on_gpu(accelerator: Any) -> bool:
    """Whether a Trainer with this option will find GPUs."""
    return accelerator not in ("cpu",) and torch.cuda.is_available()


def with_own_classes(config: Namespace) -> Namespace:
    """A copy of a parsed config whose Trainer has strategies and loggers that runs need; all arguments stay.

    On a CPU `fsdp` and FSDPStrategy are CPUFSDPStrategy. A ModelParallelStrategy without sizes is FSDP2Strategy: alone,
    it would be tensor parallelism over the devices of a node. A CSVLogger and a TensorBoardLogger go on with the files
    of earlier processes. Subclasses that are a user's own stay what they are.
    """
    config = config.clone()
    trainer = config.get(str(config.get("subcommand")), config).get("trainer")
    if trainer is not None:
        trainer["strategy"] = _strategy(trainer["strategy"], on_gpu(trainer["accelerator"]))
        loggers = trainer["logger"]
        trainer["logger"] = list(map(_logger, loggers)) if isinstance(loggers, list) else _logger(loggers)
    return config


def _strategy(given: Any, gpu: bool) -> Any:
    kind = _kind(given)
    if kind is ModelParallelStrategy and all(given.get("init_args", {}).get(n, "auto") == "auto" for n in _SIZES):
        return _instead(given, FSDP2Strategy)
    if gpu:
        return given
    if given in ("fsdp", "fsdp_cpu_offload"):
        return _instead(Namespace(init_args=Namespace()), CPUFSDPStrategy)
    return _instead(given, CPUFSDPStrategy) if kind is FSDPStrategy else given


def _logger(given: Any) -> Any:
    kind = _kind(given)
    return _instead(given, _LOGGERS[kind]) if kind in _LOGGERS else given


def _kind(given: Any) -> Any:
    """The class that a part of a config names; None if it names none."""
    if not isinstance(given, Namespace) or "class_path" not in given:
        return None
    module, _, name = given["class_path"].rpartition(".")
    return getattr(import_module(module), name)


def _instead(given: Namespace, own: type) -> Namespace:
    given = given.clone()
    given["class_path"] = f"{own.__module__}.{own.__qualname__}"
    return given
