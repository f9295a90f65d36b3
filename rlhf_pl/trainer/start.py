"""The start of a run: where it resumes, what its loggers continue, and what is written once its checks have passed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L

from rlhf_pl.callbacks import RoundCheckpoint, RoundRefresh
from rlhf_pl.callbacks.run_lifecycle import RunLifecycle
from rlhf_pl.checkpointing.checkpoints import Progress, check_readable, read_progress
from rlhf_pl.checkpointing.resume import ResumePoint, chosen_resume_point, find_resume_point
from rlhf_pl.checkpointing.safe_loading import guard_loads, load_checked
from rlhf_pl.data import RoundDataModule
from rlhf_pl.data.policy_module import is_policy_module
from rlhf_pl.distributed.ranks import ranks_of
from rlhf_pl.distributed.strategies import CPUFSDPStrategy, FSDP2Strategy
from rlhf_pl.rounds.settings import downstream_settings
from rlhf_pl.store.provenance import StageSettings
from rlhf_pl.trainer.run_loggers import resume_loggers, save_versions, start_loggers
from rlhf_pl.utils.console import console
from rlhf_pl.utils.lock import RunLock
from rlhf_pl.utils.secrets import redacted


@dataclass(frozen=True)
class RunStart:
    """How a run starts.

    Args:
        point: Where it resumes.
        progress: Progress of the checkpoint there, if there is one.
    """

    point: ResumePoint
    progress: Progress | None = None

    @property
    def checkpoint(self) -> str | None:
        """The checkpoint for `Trainer.fit`; None to start from the beginning."""
        return None if self.point.checkpoint is None else str(self.point.checkpoint)

    def begin(self, trainer: L.Trainer, write: Callable[[], None] = lambda: None) -> None:
        """Move superseded checkpoints aside, and let the loggers write. Called after the run's checks.

        Args:
            trainer: The run's Trainer.
            write: Writes further files, on rank 0.
        """
        ranks = ranks_of(trainer)

        def begin() -> None:
            self.point.commit()
            write()

        ranks.run_on_rank_zero(begin)
        start_loggers(trainer, self.progress)
        ranks.run_on_rank_zero(lambda: save_versions(trainer))


class BeginRun(L.Callback):
    """Begins a run of `RlhfTrainer` once all checks have passed."""

    def __init__(self, start: RunStart) -> None:
        self.start = start

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start.begin(trainer)


def find_start(
    trainer: L.Trainer, module: Any, data: Any, chosen: Any = None, first_lines: Sequence[str] = ()
) -> RunStart:
    """Find where a run resumes, and make its loggers continue. Writes nothing.

    Args:
        trainer: The Trainer with all its callbacks.
        module: The LightningModule.
        data: The DataModule.
        chosen: A checkpoint to resume from; None or `last` for the run directory's newest.
        first_lines: Printed once the run's checks have passed, with the checkpoint.

    Raises:
        InputError: Another process uses the run directory, or the checkpoint can't be used.
    """
    run_dir = trainer.default_root_dir
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    rounds = next((callback for callback in callbacks if isinstance(callback, RoundRefresh)), None)
    if trainer.is_global_zero:
        RunLock(run_dir).check()
    if chosen not in (None, "last"):
        point = chosen_resume_point(run_dir, Path(chosen))
    elif any(isinstance(callback, RoundCheckpoint) for callback in callbacks):
        settings = _downstream_settings(trainer, module, data, rounds)
        point = find_resume_point(run_dir, settings, trainer.max_epochs, rounds is not None and rounds.accept_changes)
    else:
        point = ResumePoint(None)
    check_loads(trainer)
    if point.checkpoint is not None:
        check_readable(point.checkpoint, trainer)
    start = RunStart(point, None if point.checkpoint is None else read_progress(point.checkpoint))
    if rounds is not None:
        rounds.progress = start.progress
    resume_loggers(trainer)
    hide_secrets_from_loggers(trainer)
    lines = [*first_lines, *([] if start.checkpoint is None else [f"Resuming from {start.checkpoint}."])]
    lifecycle = next((callback for callback in callbacks if isinstance(callback, RunLifecycle)), None)
    if lifecycle is not None:
        lifecycle.first_lines = lines
    else:  # a module of the user's
        for line in lines:
            console.print(line, soft_wrap=True)
    return start


def _downstream_settings(
    trainer: L.Trainer, module: Any, data: Any, rounds: RoundRefresh | None
) -> StageSettings | None:
    """Settings that the current round would be scored, paired and trained with; None for a run without rounds."""
    options = None if rounds is None else rounds.options
    if options is None or not is_policy_module(module) or not isinstance(data, RoundDataModule):
        return None
    return downstream_settings(module, options, trainer, data)


def check_loads(trainer: L.Trainer) -> None:
    """Make a Trainer's strategy check every checkpoint before it loads it, for users' own modules too.

    Lightning's FSDPStrategy and ModelParallelStrategy load without a CheckpointIO, so a plugin can't check for them.
    """
    strategy: Any = trainer.strategy
    if isinstance(strategy, CPUFSDPStrategy | FSDP2Strategy):
        guard_loads(trainer)
    else:
        vars(strategy).pop("load_checkpoint", None)  # of an earlier fit
        load = strategy.load_checkpoint
        strategy.load_checkpoint = lambda path, weights_only=None: load_checked(load, path)


def hide_secrets_from_loggers(trainer: L.Trainer) -> None:
    """Remove keys, tokens and passwords from the hyper-parameters that a Trainer's loggers receive."""
    for logger in trainer.loggers:
        vars(logger).pop("log_hyperparams", None)  # of an earlier fit
        logger.log_hyperparams = _without_secrets(logger.log_hyperparams)  # type: ignore[method-assign]


def _without_secrets(log: Callable[..., None]) -> Callable[..., None]:
    def log_hyperparams(params: Any = None, *args: Any, **kwargs: Any) -> None:
        log(redacted(params), *args, **kwargs)

    return log_hyperparams
