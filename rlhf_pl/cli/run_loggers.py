"""The loggers of a run: one version, id or file over all its processes, and nothing written before all is checked."""

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


class HeldLogger(Logger):
    """Written to only once nothing can be refused any more.

    Lightning asks every logger for its `experiment` before it checks anything, which would make the directory.
    """

    ready = False
    later: Any = None  # hyper-parameters of a module of the user's own

    @property
    def experiment(self) -> Any:
        if not self.ready:
            raise AttributeError(_NOT_YET)
        return super().experiment  # type: ignore[misc]

    def start(self, progress: Progress | None) -> None:
        """Go on from a checkpoint: what an earlier process logged beyond it is logged again."""
        self._go_on(progress)
        self.ready = True
        if self.later is not None:
            self.log_hyperparams(self.later)

    def _go_on(self, progress: Progress | None) -> None:
        raise NotImplementedError

    def log_hyperparams(self, params: Any = None, *args: Any, **kwargs: Any) -> None:
        if self.ready:
            super().log_hyperparams(params, *args, **kwargs)  # type: ignore[safe-super]
        else:
            self.later = params

    def save(self) -> None:
        if self.ready:
            super().save()

    def finalize(self, status: str) -> None:
        if self.ready:
            super().finalize(status)


class RunLogger(HeldLogger, TensorBoardLogger):
    """TensorBoard, which hides what is logged again. The command line makes it where TensorBoardLogger is asked for."""

    def _go_on(self, progress: Progress | None) -> None:
        self._kwargs["purge_step"] = progress.global_step if progress else 0


class RunCSVLogger(HeldLogger, CSVLogger):
    """CSVLogger that goes on with the rows of earlier processes, which Lightning's deletes; made as `RunLogger` is."""

    def _go_on(self, progress: Progress | None) -> None:
        """Keep the rows up to the checkpoint. Those after it go into a file beside it."""
        file = Path(self.log_dir) / "metrics.csv"
        rows = _read(file)
        again = [row for row in rows if _comes_again(row, progress)]
        kept = [row for row in rows if not _comes_again(row, progress)]
        columns = sorted({name for row in rows for name in row})
        if again:
            number = len(list(file.parent.glob("metrics-before-*.csv"))) + 1
            _write(file.with_name(f"metrics-before-{number}.csv"), columns, again)
        if kept:
            _write(file, columns, kept)
            file.rename(held := file.with_name(".metrics.csv"))
        self.ready = True
        file.unlink(missing_ok=True)
        if kept:  # Lightning's writer deletes what it finds
            self.experiment.metrics_keys = columns
            held.rename(file)


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


def _comes_again(row: dict[str, str], progress: Progress | None) -> bool:
    """Whether a run that goes on logs a row anew: what follows its checkpoint, and a first evaluation."""
    if progress is None or int(row["step"]) >= progress.global_step:
        return True
    if int(row["step"]) < progress.global_step - 1 or progress.inside_round:
        return False
    return bool(row.get("val/reward_mean")) or not (progress.ended or row.get("train/lr"))


def _of_wandb(logger: Any, version: str) -> None:
    logger._wandb_init["id"] = logger._id = version  # `resume` is "allow"


def _attribute(name: str) -> Callable[[Any, Any], None]:
    return lambda logger, version: setattr(logger, name, version)


# How a logger is told to go on with a run that is there: what its constructor makes of `version`, `id`, `run_id` or
# `experiment_key`. First the attribute that holds a user's own choice. By name: most packages need not be installed.
_GO_ON: dict[str, tuple[str, Callable[[Any, Any], None]]] = {
    "TensorBoardLogger": ("_version", _attribute("_version")),
    "CSVLogger": ("_version", _attribute("_version")),
    "WandbLogger": ("_id", _of_wandb),
    "MLFlowLogger": ("_run_id", _attribute("_run_id")),
    "CometLogger": ("_experiment_key", _attribute("_experiment_key")),
    "LitLogger": ("_version", _attribute("_version")),
}


def adopt_loggers(trainer: L.Trainer) -> None:
    """Before a run's checks: have its loggers go on with the versions that the run has."""
    stored = _stored(trainer)
    for number, logger in enumerate(trainer.loggers):
        held, go_on = _GO_ON.get(_kind(logger), ("", None))
        version = stored.get(_key(number, logger))
        if go_on is not None and version is not None and getattr(logger, held) is None:
            go_on(logger, version)


def start_loggers(trainer: L.Trainer, progress: Progress | None) -> None:
    """Once nothing else can be refused any more.

    Raises:
        InputError: A logger's folder can't be made.
    """
    for logger in trainer.loggers:
        if isinstance(logger, HeldLogger) and trainer.is_global_zero:
            with _naming(logger):
                logger.start(progress)
        elif isinstance(logger, HeldLogger):
            logger.ready = True


@contextmanager
def _naming(logger: Logger) -> Iterator[None]:
    """In which an error of the file system is told with the logger's name."""
    try:
        yield
    except OSError as error:
        raise InputError(f"`trainer.logger`: {_kind(logger)} can't make its files: {error}") from error


def note_versions(trainer: L.Trainer) -> None:
    """Write which versions the run's loggers have, for the processes that go on with it; on rank 0.

    Raises:
        InputError: A logger's folder can't be made.
    """
    versions = _stored(trainer)
    for number, logger in enumerate(trainer.loggers):
        if _kind(logger) in _GO_ON:
            with _naming(logger):
                _ = logger.experiment  # type: ignore[attr-defined]  # which may choose the version
            versions[_key(number, logger)] = logger.version
    text = json.dumps(versions, indent=2)
    write_atomically(_file(trainer), lambda file: file.write(text.encode()))


def _file(trainer: L.Trainer) -> Path:
    return Path(trainer.default_root_dir) / FILE


def _stored(trainer: L.Trainer) -> dict[str, Any]:
    try:
        found = json.loads(_file(trainer).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _kind(logger: Logger) -> str:
    """The name of Lightning's class."""
    return next((kind.__name__ for kind in type(logger).__mro__ if kind.__name__ in _GO_ON), "")


def _key(number: int, logger: Logger) -> str:
    """Of the logger's place: another folder, name or project is another log."""
    local = isinstance(logger, TensorBoardLogger | CSVLogger)
    return redact(f"{number}:{_kind(logger)}" + (f":{logger.save_dir}:{logger.name}" if local else ""))
