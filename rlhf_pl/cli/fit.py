"""`rlhf-pl fit`: a LightningCLI with this project's defaults."""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Optional

import lightning as L
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins import Precision

from rlhf_pl.callbacks import (
    DegenerationGuard,
    HFExport,
    OfflineLogps,
    RoundCheckpoint,
    RoundProgress,
    RoundRefresh,
    RunStopped,
    SampleTable,
    StopOnSignal,
)
from rlhf_pl.cli.group_help import group_help
from rlhf_pl.cli.option_numbers import refuse_not_finite
from rlhf_pl.cli.own_classes import fill_save_dirs, on_gpu
from rlhf_pl.cli.parser import DEFAULT_CLASSES, Parser, register_config_secrets
from rlhf_pl.cli.run_files import RunConfig
from rlhf_pl.cli.run_names import describe_run, name_run
from rlhf_pl.cli.user_errors import as_user_error
from rlhf_pl.data import RoundDataModule
from rlhf_pl.data.compatibility import check_policy_module
from rlhf_pl.distributed.strategies import CPUFSDPStrategy
from rlhf_pl.modules.trainer_options import refuse_options
from rlhf_pl.rounds.stored_rounds import refuse_same_directory
from rlhf_pl.trainer.default_callbacks import default_kinds, with_defaults
from rlhf_pl.trainer.options import DEFAULTS, has_kind, listed
from rlhf_pl.trainer.run_loggers import RunLogger
from rlhf_pl.trainer.start import find_start
from rlhf_pl.utils.console import console
from rlhf_pl.utils.cpu import cpu_fsdp
from rlhf_pl.utils.devices import describe_precision, fast_precision
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.memory import keep_freed_memory
from rlhf_pl.utils.public_names import with_public_path
from rlhf_pl.utils.terminal import print_error, set_log_folder, shows_tracebacks


class RlhfCLI(LightningCLI):
    """LightningCLI with the groups `rollout`, `samples`, `checkpoint`, `guards` and `export` for a run's callbacks."""

    def __init__(self, args: list[str] | None = None) -> None:
        super().__init__(
            L.LightningModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=1,
            trainer_defaults=DEFAULTS,
            parser_class=Parser,
            parser_kwargs={"default_env": True, "prog": "rlhf-pl"},
            save_config_callback=RunConfig,
            args=args,
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
            "--repair", action="store_true", help="Recreate damaged or missing files of the round store."
        )
        parser.add_argument(
            "--accept_changes",
            action="store_true",
            help="Continue in a run directory that was created with other settings; the new ones apply from here on.",
        )
        parser.add_argument(
            "--rounds_from",
            type=Optional[str],  # noqa: UP045 - shown in the help
            default=None,
            metavar="RUN_DIR",
            help="Train again on the rounds of another run: take the responses and rewards in its directory instead of "
            "sampling and scoring. It is only read; this run needs a directory of its own.",
        )
        parser.set_defaults({key: {"class_path": f"rlhf_pl.{kind.__name__}"} for key, kind in DEFAULT_CLASSES.items()})

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Add what a run needs beyond its config: logger, checkpoints, progress bar, report."""
        config = {**self._get(self.config_init, "trainer", default={}), **kwargs}
        refuse_options(config, in_rounds=isinstance(self.datamodule, RoundDataModule))
        run_dir = config["default_root_dir"]
        set_log_folder(run_dir)
        unit = "round" if isinstance(self.datamodule, RoundDataModule) else "epoch"
        self.first_lines = [describe_run(run_dir, config["max_epochs"], unit)]
        callbacks: list[Callback] = listed(config["callbacks"])
        if config["enable_progress_bar"] is not False and not has_kind(callbacks, ProgressBar):
            callbacks.append(RoundProgress())
        if config["logger"] in (None, True):
            kwargs["logger"] = RunLogger(run_dir, name="tensorboard", version="")
        precision = str(config["precision"] or "32-true")
        if config["precision"] in (None, DEFAULTS["precision"]) and has_kind(listed(config["plugins"]), Precision):
            kwargs["precision"] = None  # the plugin's
        else:
            kwargs["precision"] = fast_precision(precision, on_gpu(config["accelerator"]))
        if sentence := describe_precision(precision, kwargs["precision"]):
            self.first_lines.append(sentence)
        defaults = [self._get(self.config_init, c) for c in self._parser(self.subcommand).callback_keys]
        self.rounds: RoundRefresh = next(callback for callback in defaults if isinstance(callback, RoundRefresh))
        self.rounds.repair = self._get(self.config_init, "repair")
        self.rounds.accept_changes = self._get(self.config_init, "accept_changes")
        rounds_from = self._get(self.config_init, "rounds_from")
        saves = config["enable_checkpointing"] is not False
        kinds = default_kinds(self.model, self.datamodule, saves)
        if RoundRefresh not in kinds:
            self._refuse_round_options(rounds_from)
        elif rounds_from is not None:
            refuse_same_directory(rounds_from, run_dir)
            self.rounds.rounds_from = rounds_from
        if not has_kind(callbacks, StopOnSignal):
            callbacks.append(StopOnSignal())
        configured = [c for c in defaults if any(isinstance(c, kind) for kind in kinds)]
        callbacks = with_defaults(self.model, self.datamodule, [*configured, *callbacks], saves)
        for callback in callbacks:
            if isinstance(callback, OfflineLogps):
                callback.repair = self.rounds.repair
        return self._instantiate_trainer(config | kwargs | {"callbacks": callbacks}, [])

    def _refuse_round_options(self, rounds_from: str | None) -> None:
        """Refuse options of rounds in a run that has none: reward models, SFT, offline pairs, users' own modules."""
        if rounds_from is not None:
            if isinstance(self.datamodule, RoundDataModule):
                check_policy_module(self.model, self.datamodule)
            raise InputError(
                f"`--rounds_from` is {rounds_from!r}, but {type(self.model).__name__} with "
                f"{type(self.datamodule).__name__} trains on fixed data, not on rounds. Remove it, or train a "
                "RebelModule on a RoundDataModule."
            )
        if self.rounds.options is not None:
            if isinstance(self.datamodule, RoundDataModule):
                check_policy_module(self.model, self.datamodule)
            raise InputError(
                f"`rollout.reward` is given, but {type(self.model).__name__} with {type(self.datamodule).__name__} "
                "trains on fixed data and scores nothing. Remove it, or train a RebelModule on a RoundDataModule."
            )
        if self.rounds.selector is not None:
            raise InputError(
                f"`rollout.selector` is {type(self.rounds.selector).__name__}, but {type(self.datamodule).__name__} "
                "provides fixed data, of which no pairs are selected. Remove it."
            )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        Parser.arguments = list(sys.argv[1:] if args is None else args)
        with as_user_error("The command line can't be read"):
            super().parse_arguments(parser, args)
        register_config_secrets(self.config)
        config = self.config[self.config["subcommand"]]
        refuse_not_finite(config)
        if config.trainer.default_root_dir is None:
            config.trainer.default_root_dir = name_run(config)
        fill_save_dirs(config.trainer)

    def _dump_config(self) -> None:
        """Dump the config with its secrets: Lightning takes the modules' hyper-parameters from the dump."""
        Parser.shows_secrets = True
        try:
            super()._dump_config()
        finally:
            Parser.shows_secrets = False

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would let hyper-parameters in the checkpoint override the config."""

    def instantiate_classes(self) -> None:
        with as_user_error("This config can't be built"):
            super().instantiate_classes()

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Resume from the run directory's newest checkpoint, if it has one."""
        arguments = super()._prepare_subcommand_kwargs(subcommand)
        console.quiet = not self.trainer.is_global_zero
        chosen = arguments.get("ckpt_path")
        start = find_start(self.trainer, self.model, self.datamodule, chosen, self.first_lines)
        self.rounds.progress = start.progress
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RunConfig):
                callback.start = start
        arguments["ckpt_path"] = start.checkpoint
        return arguments

    def _run_subcommand(self, subcommand: str) -> None:
        on_cpu = isinstance(self.trainer.accelerator, CPUAccelerator)
        with cpu_fsdp() if on_cpu and isinstance(self.trainer.strategy, CPUFSDPStrategy) else nullcontext():
            super()._run_subcommand(subcommand)


def run(argv: Sequence[str]) -> int:
    """Run `rlhf-pl fit ...`. Return the exit code; raise InputError for a wrong input."""
    if not torch.cuda.is_available():
        keep_freed_memory()
    # Lightning's launchers start the other processes with these arguments
    Parser.shows_all, Parser.trainer_defaults = "--help_all" in argv, DEFAULTS
    if text := group_help(argv):
        print(text, end="")
        return 0
    argv = ["--help" if argument == "--help_all" else argument for argument in argv]
    arguments = [argv[0], *_environment_arguments(), *argv[1:]]
    sys.argv = [sys.argv[0], *(["--traceback"] if shows_tracebacks() else []), *arguments]
    try:
        with _stop_before_run():
            RlhfCLI(arguments if shows_tracebacks() else None)
    except RunStopped as stop:
        if not getattr(stop, "reported", False):
            print_error(stop, prefix="")
        return 128 + stop.signum
    return 0


@contextmanager
def _stop_before_run() -> Iterator[None]:
    """End with a message on SIGTERM and Ctrl-C, until StopOnSignal handles them. There is nothing to save yet."""

    def stop(number: int, _frame: Any) -> None:
        raise RunStopped(number, f"Stopped by {signal.Signals(number).name} before the run began.")

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _environment_arguments() -> list[str]:
    """Arguments from the environment, such as `--model.policy=x` from `PL_FIT__MODEL__POLICY=x`.

    They cover the groups that are classes: jsonargparse reads variables of single fields for plain groups only. Config
    files and flags override them.
    """
    arguments = []
    for group in ("model", "data"):
        prefix = f"PL_FIT__{group.upper()}__"
        for name, value in sorted(os.environ.items()):
            if name.startswith(prefix):
                field = name.removeprefix(prefix).lower().replace("__", ".")
                arguments.append(with_public_path(f"--{group}.{field}={value}"))
    return arguments
