"""What a finished run has left, for the last lines of its report: only what exists."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from rlhf_pl.callbacks.hf_export import HFExport
from rlhf_pl.data.run_limits import at_max_steps
from rlhf_pl.models.export_stamp import read_stamp


def curves(trainer: L.Trainer) -> list[str]:
    """Where each logger's curves are."""
    found = []
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            folder = Path(logger.log_dir)
            if any(folder.glob("events.out.tfevents*")):
                root = Path(trainer.default_root_dir)
                shown = root if folder.is_relative_to(root) else folder
                command = f"tensorboard --logdir {shown}"
                found.append(command if find_spec("tensorboard") else f"{command} (pip install tensorboard)")
        elif isinstance(logger, CSVLogger):
            logger.save()  # Lightning does so after this
            file = Path(logger.log_dir) / "metrics.csv"
            found += [str(file)] if file.exists() else []
        else:
            found += _of_service(logger)
    return found


def _of_service(logger: Any) -> list[str]:
    """The address of a run at a service such as W&B, or the logger's name and version."""
    name = type(logger).__name__
    url = getattr(getattr(logger, "experiment", None), "url", None)
    if isinstance(url, str) and url:
        return [url]
    place = [str(part) for part in (logger.name, logger.version) if part not in (None, "")]
    return [f"{name} {' '.join(place)}"] if place else []


def model_folder(trainer: L.Trainer, asked_by: L.Callback) -> Path | None:
    """The folder of the exported model; None if none is written.

    Args:
        trainer: The Trainer.
        asked_by: A callback in its `on_fit_end`; an export by a later callback is about to be written.
    """
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    later = callbacks[callbacks.index(asked_by) + 1 :] if asked_by in callbacks else []
    for callback in callbacks:
        if isinstance(callback, HFExport):
            folder = Path(trainer.default_root_dir) / callback.folder
            if callback in later or read_stamp(folder) is not None:
                return folder
    return None


def next_steps(trainer: L.Trainer, asked_by: L.Callback, rounds: int | None = None) -> str:
    """Commands and files that a user may want after a run in rounds; empty if there are none.

    Args:
        trainer: The Trainer.
        asked_by: A callback in its `on_fit_end`.
        rounds: Rounds of a run that was finished before it started again: how to see them, and to train further ones.
    """
    run_dir = Path(trainer.default_root_dir)
    responses = [str(run_dir / "samples.html")] if (run_dir / "samples.html").exists() else []
    responses += [f"{run_dir}/rounds/*/ (Parquet)"] if any(run_dir.glob("rounds/*/responses/*.parquet")) else []
    model = model_folder(trainer, asked_by)
    is_command = (run_dir / "config.yaml").exists()
    limit = f"--trainer.max_epochs {rounds + 2}" if is_command and rounds else f"max_epochs={(rounds or 0) + 2}"
    if at_max_steps(trainer):
        limit = f"a higher {'--trainer.' if is_command else ''}max_steps (now {trainer.global_step})"
    lines = [
        ("see the rounds:", f"rlhf-pl rounds {run_dir}" if rounds else ""),
        ("train further:", f"the same {'command' if is_command else 'Trainer'} with {limit}" if rounds else ""),
        ("see the curves:", " and ".join(curves(trainer))),
        ("read responses:", ", and ".join(responses)),
        ("use the model:", "" if model is None else f"{model}, with transformers or `vllm serve {model}`"),
        (
            "change the run:",
            f"{run_dir}/config.yaml holds every setting; `rlhf-pl fit --help_all` explains them" if is_command else "",
        ),
    ]
    shown = [f"  {name:<16} {text}" for name, text in lines if text]
    return "\n".join(["\nNext:", *shown]) if shown else ""


def done_line(trainer: L.Trainer, asked_by: L.Callback) -> str:
    """The last line of a run over fixed data."""
    model, found = model_folder(trainer, asked_by), curves(trainer)
    parts = [] if model is None else [f"The model is in {model}"]
    seen = [f"with {text}" if text.startswith("tensorboard ") else f"in {text}" for text in found]
    parts += [f"{'see' if parts else 'See'} the curves {' and '.join(seen)}"] if seen else []
    return " ".join(["Done.", *(["; ".join(parts)] if parts else [])])
