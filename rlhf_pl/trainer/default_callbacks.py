"""The callbacks that a run has by default, in their order."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from rlhf_pl.callbacks import (
    DegenerationGuard,
    EpochRun,
    HFExport,
    OfflineLogps,
    RoundCheckpoint,
    RoundRefresh,
    RunReport,
    SampleTable,
)
from rlhf_pl.data import OfflineDataModule, RoundDataModule
from rlhf_pl.data.policy_module import is_policy_module
from rlhf_pl.modules.divergence_check import DivergenceCheck
from rlhf_pl.modules.export import Exportable


def default_kinds(module: Any, data: Any, checkpoints: bool = True) -> list[type[L.Callback]]:
    """The kinds of this package's callbacks that a run has, in their order, but for what is shown on the terminal.

    Args:
        module: The LightningModule.
        data: The DataModule.
        checkpoints: Whether the run saves checkpoints.
    """
    kinds: list[type[L.Callback]] = [DivergenceCheck]
    if is_policy_module(module) and isinstance(data, RoundDataModule):
        kinds += [RoundRefresh, SampleTable, RoundCheckpoint, DegenerationGuard, HFExport]
    else:
        kinds += [EpochRun] if hasattr(module, "describe_epoch") else []
        kinds += [OfflineLogps] if isinstance(data, OfflineDataModule) else []
        kinds += [RoundCheckpoint, HFExport] if isinstance(module, Exportable) else [RoundCheckpoint]
    return [kind for kind in kinds if checkpoints or kind is not RoundCheckpoint]


def with_defaults(module: Any, data: Any, given: list[L.Callback], checkpoints: bool = True) -> list[L.Callback]:
    """The callbacks of a run, from the command line and from Python.

    This package's callbacks run first: EarlyStopping and others read the metrics that they log.

    Args:
        module: The LightningModule.
        data: The DataModule.
        given: The user's callbacks; one of a default kind replaces the default.
        checkpoints: Whether the run saves checkpoints.
    """
    kinds = default_kinds(module, data, checkpoints)
    first: list[L.Callback] = []
    for kind in kinds:
        found = [callback for callback in given if isinstance(callback, kind)]
        first += found or [kind()]
    rest = [callback for callback in given if not any(callback is other for other in first)]
    if RoundRefresh in kinds and not any(isinstance(callback, RunReport) for callback in rest):
        rest.append(RunReport())
    # Lightning keeps checkpoints last
    return [*(c for c in first + rest if not isinstance(c, Checkpoint)), *filter(_is_checkpoint, first + rest)]


def _is_checkpoint(callback: L.Callback) -> bool:
    return isinstance(callback, Checkpoint)
