"""`rlhf-pl fit`: a LightningCLI with this project's defaults."""

import inspect
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from rlhf_pl.callbacks import (
    DegenerationGuard,
    HFExport,
    RoundCheckpoint,
    RoundProgress,
    RoundRefresh,
    RunReport,
    RunStopped,
    SampleTable,
)
from rlhf_pl.checkpoints import read_progress
from rlhf_pl.console import console
from rlhf_pl.data import RoundDataModule
from rlhf_pl.disk import full_disk_error, write_atomically
from rlhf_pl.errors import InputError
from rlhf_pl.lock import RunLock
from rlhf_pl.memory import keep_freed_memory
from rlhf_pl.modules import RebelModule
from rlhf_pl.provenance import StageSettings
from rlhf_pl.resume import ResumePoint, find_resume_point
from rlhf_pl.rollout.self_check import StaleSamplerError
from rlhf_pl.round_maker import downstream_settings

TRAINER_DEFAULTS = {
    "max_epochs": 3,
    "default_root_dir": "runs/rebel",
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
    "reload_dataloaders_every_n_epochs": 1,
    "use_distributed_sampler": False,
    "enable_model_summary": False,
}


DEFAULT_CLASSES = {"model": RebelModule, "data": RoundDataModule}


MAX_ERROR_LINES = 12


class Parser(LightningArgumentParser):
    """Errors in a few lines instead of after a page of usage, and a help that includes the default classes."""

    def format_help(self, formatter: Any = None) -> str:
        text = super().format_help(formatter)
        if "--model" not in self._option_string_actions:
            return text
        for key, kind in DEFAULT_CLASSES.items():
            section = ArgumentParser()
            section.add_class_arguments(kind, key, fail_untyped=False)
            _usage, _options, group = section.format_help().split("\n\n", 2)
            text += f"\n{kind.__name__}, the default `{key}`:\n" + group.split("\n", 1)[1]
        return text

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        message = re.sub(r"required: (\w+)$", _full_name, str(message))
        lines = list(dict.fromkeys(line for line in message.splitlines() if not _is_noise(line)))
        if len(lines) > MAX_ERROR_LINES:
            lines = [*lines[: MAX_ERROR_LINES - 1], "  ..."]
        print("error: " + "\n".join(lines).strip(), file=sys.stderr)
        print("`rlhf-pl fit --help` lists the options.", file=sys.stderr)
        sys.exit(2)


def _full_name(required: re.Match[str]) -> str:
    """A missing argument of a class as the option that gives it."""
    name = required[1]
    key = next((k for k, kind in DEFAULT_CLASSES.items() if name in inspect.signature(kind).parameters), None)
    return f"required: --{key}.{name}" if key else required[0]


def _is_noise(line: str) -> bool:
    """What jsonargparse says of the alternatives that nobody meant."""
    text = line.strip()
    alternatives = ("Subtypes: [", "Subclass types expect", "- a class path (str)", "- a dict w")
    return text.startswith(("Given value type:", "Given value: NestedArg", *alternatives)) or "NoneType" in text


class RunLogger(TensorBoardLogger):
    """TensorBoard in the run directory, which is written to only once nothing can be refused any more.

    Lightning asks every logger for its `experiment` before it checks anything, which would make the directory.
    """

    ready = False

    @property
    def experiment(self) -> Any:
        if not self.ready:
            raise AttributeError("The run has not passed its checks yet.")
        return super().experiment

    def purge_from(self, step: int) -> None:
        """Hide what an earlier process logged from `step` on: it is logged again."""
        self._kwargs["purge_step"] = step

    def finalize(self, status: str) -> None:
        if self.ready:
            super().finalize(status)


class RunConfig(SaveConfigCallback):
    """Writes the resolved config to the run directory, once nothing can be refused any more."""

    resume_point = ResumePoint(None)
    lock: RunLock | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """The last callback's setup: the others have made their checks."""
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.ready = True

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            self.lock = RunLock(trainer.default_root_dir)
            self.lock.acquire()
            self.resume_point.commit()
            folder = Path(trainer.default_root_dir)
            once = {"repair": False, "accept_changes": False, "ckpt_path": None}  # of this start, not of the run
            config = self.config.clone()
            for key, value in once.items():
                config[key] = value
            text = self.parser.dump(config, skip_none=False)
            write_atomically(folder / "config.yaml", lambda file: file.write(text.encode()))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._release()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        if self.lock is not None:
            self.lock.release()


class RlhfCLI(LightningCLI):
    """LightningCLI with the groups `rollout`, `samples` and `export` for the callbacks that every run has."""

    def __init__(self) -> None:
        super().__init__(
            L.LightningModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=1,
            trainer_defaults=TRAINER_DEFAULTS,
            parser_class=Parser,
            parser_kwargs={"default_env": True, "prog": "rlhf-pl"},
            save_config_callback=RunConfig,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(RoundRefresh, "rollout")
        parser.add_lightning_class_args(SampleTable, "samples")
        parser.add_lightning_class_args(RoundCheckpoint, "checkpoint")
        parser.add_lightning_class_args(DegenerationGuard, "guards")
        parser.add_lightning_class_args(HFExport, "export")
        parser.add_argument(
            "--repair", action="store_true", help="Make damaged or missing files of the round store again."
        )
        parser.add_argument(
            "--accept_changes",
            action="store_true",
            help="Go on in a run directory that was made with other settings; they count from here on.",
        )
        parser.set_defaults({key: {"class_path": f"rlhf_pl.{kind.__name__}"} for key, kind in DEFAULT_CLASSES.items()})

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Add what a run needs and the config does not name: logger, checkpoints, progress bar, report."""
        config = {**self._get(self.config_init, "trainer", default={}), **kwargs}
        run_dir = config["default_root_dir"]
        given = config["callbacks"] or []
        callbacks: list[Callback] = list(given) if isinstance(given, list) else [given]
        if config["enable_progress_bar"] is not False and not _has(callbacks, ProgressBar):
            callbacks.append(RoundProgress())
        if config["logger"] in (None, True):
            kwargs["logger"] = RunLogger(run_dir, name="tensorboard", version="")
        self._check_devices(config)
        own = [self._get(self.config_init, c) for c in self._parser(self.subcommand).callback_keys]
        if config["enable_checkpointing"] is False:
            own = [callback for callback in own if not isinstance(callback, RoundCheckpoint)]
        self.rounds: RoundRefresh = next(callback for callback in own if isinstance(callback, RoundRefresh))
        self.rounds.repair = self._get(self.config_init, "repair")
        self.rounds.accept_changes = self._get(self.config_init, "accept_changes")
        return self._instantiate_trainer(config | kwargs | {"callbacks": callbacks}, [*own, RunReport()])

    @staticmethod
    def _check_devices(config: dict[str, Any]) -> None:
        """Refuse several devices before Lightning starts their processes."""
        devices, nodes = config["devices"], config["num_nodes"]
        count = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdigit() else 1
        if count * nodes > 1:
            raise InputError(
                f"`trainer.devices`: rounds are prepared by one process so far, and this run asks for {count} devices "
                f"on {nodes} nodes. Set --trainer.devices 1 --trainer.num_nodes 1."
            )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        with _as_mistakes("The command line can't be read"):
            super().parse_arguments(parser, args)

    def _parse_ckpt_path(self) -> None:
        with _as_mistakes("`ckpt_path` can't be read"):
            super()._parse_ckpt_path()

    def instantiate_classes(self) -> None:
        with _as_mistakes("This config can't be built"):
            super().instantiate_classes()

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Go on from the run directory's newest checkpoint, if it has one."""
        arguments = super()._prepare_subcommand_kwargs(subcommand)
        run_dir = self.trainer.default_root_dir
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        RunLock(run_dir).check()
        point = ResumePoint(None if arguments.get("ckpt_path") in (None, "last") else Path(arguments["ckpt_path"]))
        if point.checkpoint is None and _has(callbacks, RoundCheckpoint):
            point = find_resume_point(
                run_dir, self._downstream_settings(), self.trainer.max_epochs, self.rounds.accept_changes
            )
        elif point.checkpoint is not None and read_progress(point.checkpoint) is None:
            raise InputError(f"`ckpt_path`: {str(point.checkpoint)!r} is no readable checkpoint of this program.")
        for callback in callbacks:
            if isinstance(callback, RunConfig):
                callback.resume_point = point
        arguments["ckpt_path"] = None if point.checkpoint is None else str(point.checkpoint)
        progress = None if point.checkpoint is None else read_progress(point.checkpoint)
        for logger in self.trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.purge_from(progress.global_step if progress else 0)
        if point.checkpoint is not None:
            console.print(f"Going on from {point.checkpoint}.", soft_wrap=True)
        return arguments

    def _downstream_settings(self) -> StageSettings | None:
        """What the round at hand would be scored, paired and trained with."""
        module, data, options = self.model, self.datamodule, self.rounds.options
        if options is None or not isinstance(module, RebelModule) or not isinstance(data, RoundDataModule):
            return None
        return downstream_settings(module, options, self.trainer, data)


@contextmanager
def _as_mistakes(what: str) -> Iterator[None]:
    """What goes wrong in the block is a mistake in the config, whichever library notices."""
    try:
        yield
    except Exception as error:
        if _cause(error) is not None or os.environ.get("RLHF_PL_VERBOSE") == "1":
            raise
        raise InputError(f"{what}: {_in_a_line(error)}") from error


def _in_a_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def _has(callbacks: list[Callback], kind: type) -> bool:
    return any(isinstance(callback, kind) for callback in callbacks)


def run(argv: Sequence[str]) -> int:
    """`rlhf-pl fit ...`: 0, or 1 with one error for a wrong input."""
    _quiet_libraries()
    if not torch.cuda.is_available():
        keep_freed_memory()
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # users' rewards and classes live where they call us
    before = sys.argv
    # Lightning's launchers start further processes with these arguments.
    sys.argv = [before[0], argv[0], *_environment_arguments(), *argv[1:]]
    try:
        RlhfCLI()
    except RunStopped as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.signum
    except KeyboardInterrupt:
        print("Stopped by SIGINT before the run began.", file=sys.stderr)
        return 130
    except Exception as error:
        wrong = _cause(error)
        if wrong is None:
            raise
        print(f"error: {wrong}", file=sys.stderr)
        return 1
    return 0


_MISTAKES = (InputError, StaleSamplerError, MisconfigurationException, PermissionError)


def _cause(error: BaseException | None) -> BaseException | None:
    """The user's mistake behind `error`, if it is one: jsonargparse wraps what a constructor raises."""
    while error is not None and not isinstance(error, _MISTAKES):
        if isinstance(error, OSError) and (full := full_disk_error(Path(error.filename or "."), error)):
            return full
        if isinstance(error, ValueError | TypeError | OverflowError) and _raised_by(error, "lightning"):
            return InputError(f"The Trainer refuses this config: {_in_a_line(error)}")
        error = error.__cause__ or error.__context__
    return error


def _raised_by(error: BaseException, package: str) -> bool:
    """Whether the line that raised is the package's own."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return bool(frames) and frames[-1][0].f_globals.get("__name__", "").split(".")[0] == package


def _environment_arguments() -> list[str]:
    """`PL_FIT__MODEL__POLICY=x` as `--model.policy=x`, for the groups that are classes.

    jsonargparse reads variables of single fields for plain groups only. As there, config files and flags win.
    """
    arguments = []
    for group in ("model", "data"):
        prefix = f"PL_FIT__{group.upper()}__"
        for name, value in sorted(os.environ.items()):
            if name.startswith(prefix):
                field = name.removeprefix(prefix).lower().replace("__", ".")
                arguments.append(f"--{group}.{field}={value}")
    return arguments


def _quiet_libraries() -> None:
    """Keep the terminal for what the user asked for. `RLHF_PL_VERBOSE=1` lets the libraries talk."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if os.environ.get("RLHF_PL_VERBOSE") == "1":
        return
    for name in ("lightning.pytorch", "lightning.fabric", "transformers", "datasets", "huggingface_hub", "filelock"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(lightning|torch|transformers|jsonargparse|vllm)\b.*")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
