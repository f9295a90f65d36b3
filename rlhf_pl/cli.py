"""`rlhf-pl fit`: a LightningCLI with this project's defaults."""

import inspect
import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from rlhf_pl.callbacks import HFExport, RoundProgress, RoundRefresh, RunReport, SampleTable
from rlhf_pl.console import console
from rlhf_pl.data import RoundDataModule
from rlhf_pl.errors import InputError
from rlhf_pl.memory import keep_freed_memory
from rlhf_pl.modules import RebelModule
from rlhf_pl.rollout.self_check import StaleSamplerError

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
        lines = [line for line in message.splitlines() if not _is_noise(line)]
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
    return text.startswith(("Given value type:", "Given value: NestedArg", "Subtypes: [")) or "NoneType" in text


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

    def finalize(self, status: str) -> None:
        if self.ready:
            super().finalize(status)


class RunConfig(SaveConfigCallback):
    """Writes the resolved config to the run directory, once nothing can be refused any more."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """The last callback's setup: the others have made their checks."""
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.ready = True

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            self.parser.save(self.config, str(folder / "config.yaml"), skip_none=False, overwrite=True)


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
        parser.add_lightning_class_args(HFExport, "export")
        parser.set_defaults({key: {"class_path": f"rlhf_pl.{kind.__name__}"} for key, kind in DEFAULT_CLASSES.items()})

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Add what a run needs and the config does not name: logger, checkpoints, progress bar, report."""
        config = {**self._get(self.config_init, "trainer", default={}), **kwargs}
        run_dir = config["default_root_dir"]
        given = config["callbacks"] or []
        callbacks: list[Callback] = list(given) if isinstance(given, list) else [given]
        if config["enable_progress_bar"] is not False and not _has(callbacks, ProgressBar):
            callbacks.append(RoundProgress())
        if config["enable_checkpointing"] is not False and not _has(callbacks, ModelCheckpoint):
            callbacks.append(
                ModelCheckpoint(
                    dirpath=os.path.join(run_dir, "checkpoints"), save_last="link", save_on_train_epoch_end=True
                )
            )
        if config["logger"] in (None, True):
            kwargs["logger"] = RunLogger(run_dir, name="tensorboard", version="")
        self._check_devices(config)
        own = [self._get(self.config_init, c) for c in self._parser(self.subcommand).callback_keys]
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

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Go on from the run directory's last checkpoint, if it has one."""
        arguments = super()._prepare_subcommand_kwargs(subcommand)
        folders = [c.dirpath for c in self.trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        last = next((p for d in folders if d and (p := Path(d) / "last.ckpt").exists()), None)
        if last is not None and arguments.get("ckpt_path") is None:
            arguments["ckpt_path"] = str(last)
            console.print(f"Going on from {last}.")
        return arguments


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
        error = error.__cause__ or error.__context__
    return error


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
