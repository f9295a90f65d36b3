"""The short help of `rlhf-pl fit`: a line for each option of this package, from signatures and docstrings."""

import dataclasses
import inspect
import re
import shutil
import textwrap
from typing import Any

import lightning as L
from docstring_parser import parse

from rlhf_pl.algorithms.losses import RebelLoss
from rlhf_pl.callbacks import DegenerationGuard, HFExport, RoundCheckpoint, RoundRefresh, SampleTable
from rlhf_pl.data import RoundDataModule
from rlhf_pl.modules import RebelModule
from rlhf_pl.modules.optimizers import AdamW
from rlhf_pl.utils.errors import InputError

USAGE = """\
usage: rlhf-pl fit [--config FILE] [options]

  rlhf-pl fit --model.policy MODEL --data.prompts FILE --rollout.reward my.score
  rlhf-pl fit --config configs/quickstart.yaml --trainer.max_epochs 5
  rlhf-pl fit --model SFTModule --model.policy MODEL \\
      --data SFTDataModule --data.conversations FILE

more help:
  --help_all                          the full texts, and Lightning's options
  --model.help PPOModule              options of one class
  --data.help SFTDataModule           the same for the data
  --rollout.sampler.help VLLMSampler  and for other options that take a class
  --model.lora.help                   options of a group; also --checkpoint.help
  --config FILE --print_config        the complete config, with all defaults
"""
RUN = {
    "config": ("", "A YAML file of options; flags after it override it, and later files earlier ones."),
    "print_config": ("", "Print the complete config and exit."),
    "seed_everything": ("1", "The run's seed."),
    "ckpt_path": ("null", "Resume from this checkpoint instead of the newest."),
    "rounds_from": ("null", "Train again on the responses and rewards of the run in this directory."),
    "repair": ("", "Recreate damaged or missing files of the round store."),
    "accept_changes": ("", "Continue a run with changed settings, which apply from here on."),
}
TRAINER = {
    "accelerator": "Kind of device: auto, cpu or gpu.",
    "devices": "Devices of a node: a number, a list, or auto for all GPUs.",
    "strategy": "How several devices work together: ddp, fsdp, fsdp2 or a class.",
    "precision": "bf16-mixed, 16-mixed or 32-true.",
    "max_epochs": "Rounds of a run; epochs over fixed data.",
    "default_root_dir": "The run directory; the same command resumes in it.",
    "accumulate_grad_batches": "Micro-batches of an update.",
    "gradient_clip_val": "Maximum norm of an update's gradients.",
    "logger": "TensorBoardLogger, CSVLogger, WandbLogger, ...; false for none.",
    "callbacks": "Further callbacks; add one with --trainer.callbacks+ CLASS.",
}
SECTIONS: dict[str, type] = {
    "model": RebelModule,
    "data": RoundDataModule,
    "rollout": RoundRefresh,
    "samples": SampleTable,
    "checkpoint": RoundCheckpoint,
    "guards": DegenerationGuard,
    "export": HFExport,
}
# the options of default classes that most runs tune
OF_CLASSES: dict[str, tuple[type, str]] = {"model.loss": (RebelLoss, "eta"), "model.optimizer": (AdamW, "lr")}


def short_help(trainer_defaults: dict[str, Any]) -> str:
    """The text of `rlhf-pl fit --help`.

    Args:
        trainer_defaults: The command's defaults of the Trainer's options.
    """
    parts = [USAGE, "run:", *(_line(f"--{name}", *shown) for name, shown in RUN.items())]
    parts.append("\ntrainer: the options of Lightning's Trainer that runs use most")
    known = inspect.signature(L.Trainer).parameters
    for name, text in TRAINER.items():
        if name not in known:
            raise InputError(f"Lightning's Trainer has no option {name!r}.")
        parts.append(_line(f"--trainer.{name}", _shown(trainer_defaults.get(name, known[name].default)), text))
    for key, kind in SECTIONS.items():
        parts += ["", f"{key}: {_first_sentence(inspect.getdoc(kind) or '')}" if key not in ("model", "data") else
                  f"{key}: {kind.__name__}, unless --{key} names another class", *_lines(f"--{key}", kind)]  # fmt: skip
    return "\n".join(parts) + "\n"


def _lines(prefix: str, kind: type) -> list[str]:
    """A line for each parameter of a class; the parameters of a dataclass that is a default follow it."""
    texts, lines = _parameter_texts(kind), []
    for name, parameter in inspect.signature(kind).parameters.items():
        default = parameter.default
        lines.append(_line(f"{prefix}.{name}", _shown(default), _first_sentence(texts.get(name, ""))))
        if dataclasses.is_dataclass(default) and not isinstance(default, type):
            lines += _lines(f"{prefix}.{name}", type(default))
        if (further := OF_CLASSES.get(f"{prefix}.{name}".removeprefix("--"))) is not None:
            lines.append(_option_of_class(f"{prefix}.{name}", *further))
    return lines


def _option_of_class(prefix: str, kind: type, name: str) -> str:
    """The line of one option of a default class."""
    shown = _shown(inspect.signature(kind).parameters[name].default)
    return _line(f"{prefix}.{name}", shown, _first_sentence(_parameter_texts(kind)[name]))


def _parameter_texts(kind: type) -> dict[str, str]:
    return {p.arg_name: p.description or "" for p in parse(inspect.getdoc(kind) or "").params}


def option_names(prefix: str, kind: type) -> list[str]:
    """The options of a class, without dashes, with those of dataclasses that are defaults."""
    names = []
    for name, parameter in inspect.signature(kind).parameters.items():
        names.append(f"{prefix}.{name}")
        if dataclasses.is_dataclass(parameter.default) and not isinstance(parameter.default, type):
            names += option_names(f"{prefix}.{name}", type(parameter.default))
    return names


def _shown(default: Any) -> str:
    """A default as it is written in YAML; the name of an object's class."""
    if default is inspect.Parameter.empty:
        return "(required)"
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    if isinstance(default, str | int | float | list | tuple | dict):
        return str(list(default) if isinstance(default, tuple) else default)
    if type(default).__name__ == "_HAS_DEFAULT_FACTORY_CLASS":
        return "{}"
    if inspect.isfunction(default):  # such as `lambda p: AdamW(p)`
        return default.__code__.co_names[0]
    return getattr(default, "__name__", type(default).__name__)


def _first_sentence(text: str) -> str:
    flat = " ".join(text.split())
    end = re.search(r"(?<!e\.g)\. ", flat)
    return (flat if end is None else flat[: end.start()]).rstrip(".") + "."


def _line(option: str, default: str, text: str) -> str:
    """One line of at most the terminal's width, or 120 columns: option, text, default."""
    width = min(120, max(80, shutil.get_terminal_size((120, 24)).columns))
    end = f" [{default}]" if default else ""
    start = f"  {option:<36} "
    end = end if len(start) + len(end) + 12 <= width else " [...]"
    room = width - len(start) - len(end)
    return start + (textwrap.shorten(text, room, placeholder=" ...") if room > 8 else "") + end
