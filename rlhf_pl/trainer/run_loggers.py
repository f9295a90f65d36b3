"""The loggers of a run: all its processes use the same version, id or file, and write only after the run's checks."""

import csv
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from rlhf_pl.checkpointing.checkpoints import Progress
from rlhf_pl.utils.disk import write_atomically
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.secrets import redact

FILE = "loggers.json"
_NOT_YET = "The run has not passed its checks yet."


class DeferredLogger(Logger):
    """Writes only after the run's checks have passed.

    Lightning reads every logger's `experiment` before it checks anything, which would create the directory.

    Attributes:
        is_ready: Whether the checks have passed.
        deferred_hyperparams: Hyper-parameters of a user's own module, logged at the start.
    """

    is_ready = False
    deferred_hyperparams: Any = None

    @property
    def experiment(self) -> Any:
        if not self.is_ready:
            raise AttributeError(_NOT_YET)
        return super().experiment  # type: ignore[misc]

    def start(self, progress: Progress | None) -> None:
        """Resume from a checkpoint. Later rows of an earlier process are logged again."""
        self._resume(progress)
        self.is_ready = True
        if self.deferred_hyperparams is not None:
            self.log_hyperparams(self.deferred_hyperparams)

    def _resume(self, progress: Progress | None) -> None:
        raise NotImplementedError

    def log_hyperparams(self, params: Any = None, *args: Any, **kwargs: Any) -> None:
        if self.is_ready:
            super().log_hyperparams(params, *args, **kwargs)  # type: ignore[safe-super]
        else:
            self.deferred_hyperparams = params

    def save(self) -> None:
        if self.is_ready:
            super().save()

    def finalize(self, status: str) -> None:
        if self.is_ready:
            super().finalize(status)


class RunLogger(DeferredLogger, TensorBoardLogger):
    """TensorBoardLogger that hides rows which are logged again. The command line replaces TensorBoardLogger by it."""

    def _resume(self, progress: Progress | None) -> None:
        self._kwargs["purge_step"] = progress.global_step if progress else 0


class RunCSVLogger(DeferredLogger, CSVLogger):
    """CSVLogger that keeps the rows of earlier processes, which Lightning's deletes. It replaces CSVLogger."""

    def _resume(self, progress: Progress | None) -> None:
        """Keep the rows up to the checkpoint. Move later ones to a file beside it."""
        file = Path(self.log_dir) / "metrics.csv"
        rows = _read(file)
        repeated = [row for row in rows if _is_logged_again(row, progress)]
        kept = [row for row in rows if not _is_logged_again(row, progress)]
        columns = sorted({name for row in rows for name in row})
        if repeated:
            number = len(list(file.parent.glob("metrics-before-*.csv"))) + 1
            _write(file.with_name(f"metrics-before-{number}.csv"), columns, repeated)
        if kept:
            _write(file, columns, kept)
            file.rename(aside := file.with_name(".metrics.csv"))
        self.is_ready = True
        file.unlink(missing_ok=True)
        if kept:  # Lightning's writer deletes an existing file
            self.experiment.metrics_keys = columns
            aside.rename(file)


def _read(file: Path) -> list[dict[str, str]]:
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as opened:
        return [row for row in csv.DictReader(opened) if (row.get("step") or "").isdigit()]


def _write(file: Path, columns: list[str], rows: list[dict[str, str]]) -> None:
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, fieldnames=columns)
        writer.writeheader()
        writer.writerows(rows)


def _is_logged_again(row: dict[str, str], progress: Progress | None) -> bool:
    """Whether a resumed run logs a row again: the rows after its checkpoint, and a first evaluation."""
    if progress is None or int(row["step"]) >= progress.global_step:
        return True
    if int(row["step"]) < progress.global_step - 1 or progress.is_inside_round:
        return False
    return bool(row.get("val/reward_mean")) or not (progress.has_ended_round or row.get("train/lr"))


def _set_wandb_id(logger: Any, version: str) -> None:
    logger._wandb_init["id"] = logger._id = version  # `resume` is "allow"


def _set_attribute(name: str) -> Callable[[Any, Any], None]:
    return lambda logger, version: setattr(logger, name, version)


# By class name, as most packages need not be installed: the attribute with the `version`, `id`, `run_id` or
# `experiment_key` that the user has chosen, and a function that makes the logger continue a version.
_RESUME: dict[str, tuple[str, Callable[[Any, Any], None]]] = {
    "TensorBoardLogger": ("_version", _set_attribute("_version")),
    "CSVLogger": ("_version", _set_attribute("_version")),
    "WandbLogger": ("_id", _set_wandb_id),
    "MLFlowLogger": ("_run_id", _set_attribute("_run_id")),
    "CometLogger": ("_experiment_key", _set_attribute("_experiment_key")),
    "LitLogger": ("_version", _set_attribute("_version")),
}


def resume_loggers(trainer: L.Trainer) -> None:
    """Make a run's loggers continue the versions of its earlier processes. Called before the run's checks."""
    stored = _read_versions(trainer)
    for number, logger in enumerate(trainer.loggers):
        attribute, resume = _RESUME.get(_kind(logger), ("", None))
        version = stored.get(_key(number, logger))
        if resume is not None and version is not None and getattr(logger, attribute) is None:
            resume(logger, version)


def start_loggers(trainer: L.Trainer, progress: Progress | None) -> None:
    """Let the loggers write. Called after the run's checks.

    Raises:
        InputError: A logger's folder can't be created.
    """
    for logger in trainer.loggers:
        if isinstance(logger, DeferredLogger) and trainer.is_global_zero:
            with _translate_os_errors(logger):
                logger.start(progress)
        elif isinstance(logger, DeferredLogger):
            logger.is_ready = True


@contextmanager
def _translate_os_errors(logger: Logger) -> Iterator[None]:
    """Raise the file system's errors as InputErrors that name the logger."""
    try:
        yield
    except OSError as error:
        raise InputError(f"`trainer.logger`: {_kind(logger)} can't create its files: {error}") from error


def save_versions(trainer: L.Trainer) -> None:
    """Write the versions of the run's loggers to its directory, for later processes. Called on rank 0.

    Raises:
        InputError: A logger's folder can't be created.
    """
    versions = _read_versions(trainer)
    for number, logger in enumerate(trainer.loggers):
        if _kind(logger) in _RESUME:
            with _translate_os_errors(logger):
                _ = logger.experiment  # type: ignore[attr-defined]  # which may choose the version
            versions[_key(number, logger)] = logger.version
    text = json.dumps(versions, indent=2)
    write_atomically(_file(trainer), lambda file: file.write(text.encode()))


def _file(trainer: L.Trainer) -> Path:
    return Path(trainer.default_root_dir) / FILE


def _read_versions(trainer: L.Trainer) -> dict[str, Any]:
    try:
        found = json.loads(_file(trainer).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _kind(logger: Logger) -> str:
    """Name of the logger's Lightning class; empty for other classes."""
    return next((kind.__name__ for kind in type(logger).__mro__ if kind.__name__ in _RESUME), "")


def _key(number: int, logger: Logger) -> str:
    """Key of a logger's version. Another folder, name or project is another log."""
    local = isinstance(logger, TensorBoardLogger | CSVLogger)
    return redact(f"{number}:{_kind(logger)}" + (f":{logger.save_dir}:{logger.name}" if local else ""))
