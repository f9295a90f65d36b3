"""A Lightning Trainer with the defaults of the command line, whose `fit` resumes."""

from contextlib import nullcontext
from typing import Any

import lightning as L
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.plugins import Precision

from rlhf_pl.callbacks import RoundCheckpoint, RoundProgress, StopOnSignal
from rlhf_pl.data import RoundDataModule
from rlhf_pl.distributed.strategies import CPUFSDPStrategy, FSDP2Strategy
from rlhf_pl.modules.trainer_options import refuse_options
from rlhf_pl.trainer.default_callbacks import with_defaults
from rlhf_pl.trainer.library_messages import hidden_messages
from rlhf_pl.trainer.options import DEFAULTS, has_kind, listed
from rlhf_pl.trainer.run_loggers import RunLogger
from rlhf_pl.trainer.start import BeginRun, find_start
from rlhf_pl.utils.console import console
from rlhf_pl.utils.cpu import cpu_fsdp
from rlhf_pl.utils.devices import describe_precision, fast_precision


class RlhfTrainer(L.Trainer):
    """Lightning's Trainer with what `rlhf-pl fit` adds: defaults, callbacks, a logger, and a `fit` that resumes.

    `fit(module, datamodule=data)` goes on from the newest checkpoint in `default_root_dir`, inside a round too, and
    from what is stored of the round. A run that was killed is started again by the same call. Callbacks of the
    command line that are not given are added: for rounds `SampleTable`, `DegenerationGuard` and `RunReport`, and for
    all of this package's modules `RoundCheckpoint` (no other checkpoints are written), `HFExport`, `RoundProgress` and
    `StopOnSignal`. While it is created and fits, the libraries' own messages are hidden, but with `RLHF_PL_VERBOSE=1`.

    Args:
        default_root_dir: The run directory. Another run needs another one.
        precision: Null for `bf16-mixed`; float32 on CPUs without instructions for bfloat16.
        **options: Lightning's options.

    Raises:
        InputError: An option can't work here.
    """

    def __init__(self, *, default_root_dir: str, precision: Any = None, **options: Any) -> None:
        options = {**DEFAULTS, **options, "default_root_dir": str(default_root_dir)}
        callbacks: list[Callback] = listed(options.pop("callbacks", None))
        given = {"fast_dev_run": False, "barebones": False, **options}
        refuse_options(given, in_rounds=True)
        if options.get("enable_progress_bar") is not False and not has_kind(callbacks, ProgressBar):
            callbacks.append(RoundProgress())
        if not has_kind(callbacks, StopOnSignal):
            callbacks.append(StopOnSignal())
        self._saves = options.get("enable_checkpointing") is not False
        if self._saves and not has_kind(callbacks, RoundCheckpoint):
            callbacks.append(RoundCheckpoint())
        if options.get("logger") in (None, True):
            options["logger"] = RunLogger(options["default_root_dir"], name="tensorboard", version="")
        on_gpu = options.get("accelerator", "auto") != "cpu" and torch.cuda.is_available()
        options["strategy"] = _strategy(options.get("strategy", "auto"), on_gpu)
        default = options.pop("precision")
        if precision is not None or not has_kind(listed(options.get("plugins")), Precision):
            options["precision"] = fast_precision(str(precision or default), on_gpu)
        sentence = describe_precision(str(precision or default), options.get("precision"))
        self._first_lines = [sentence] if sentence else []
        with hidden_messages():
            super().__init__(callbacks=callbacks, **options)

    def fit(
        self,
        model: L.LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: L.LightningDataModule | None = None,
        ckpt_path: Any = None,
        weights_only: bool | None = None,
    ) -> None:
        """Train a module, from where the run directory's last process stopped.

        Args:
            model: The module.
            train_dataloaders: As in Lightning; for this package's modules give `datamodule`.
            val_dataloaders: As in Lightning.
            datamodule: The DataModule.
            ckpt_path: A checkpoint to resume from; None or `last` for the newest in the run directory.
            weights_only: As in Lightning.

        Raises:
            InputError: An input or a changed setting is refused.
            RunStopped: SIGTERM or Ctrl-C ended the run, after the update in progress was saved.
        """
        if isinstance(train_dataloaders, L.LightningDataModule) and datamodule is None:
            train_dataloaders, datamodule = None, train_dataloaders
        run: Any = self
        own = [callback for callback in run.callbacks if not isinstance(callback, BeginRun)]
        run.callbacks = with_defaults(model, datamodule, own, self._saves)
        was_quiet, console.quiet = console.quiet, not self.is_global_zero
        fsdp = isinstance(self.accelerator, CPUAccelerator) and isinstance(self.strategy, CPUFSDPStrategy)
        try:
            with hidden_messages(), cpu_fsdp() if fsdp else nullcontext():
                if isinstance(datamodule, RoundDataModule):
                    datamodule.trainer = self  # which the settings of an update depend on
                start = find_start(self, model, datamodule, ckpt_path, self._first_lines)
                run.callbacks.append(BeginRun(start))
                super().fit(
                    model, train_dataloaders, val_dataloaders, datamodule, start.checkpoint, weights_only=weights_only
                )
        finally:
            console.quiet = was_quiet


def _strategy(given: Any, on_gpu: bool) -> Any:
    """The strategy of a name that Lightning lacks, or refuses on CPUs."""
    if given == "fsdp2":
        return FSDP2Strategy()
    if given == "fsdp" and not on_gpu:
        return CPUFSDPStrategy()
    return given
