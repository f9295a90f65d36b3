"""What a misspelt option or class may have meant."""

import difflib
import inspect
import re
from collections.abc import Iterable

import lightning as L
from lightning.pytorch import callbacks
from torch import optim

import rlhf_pl
from rlhf_pl.algorithms.losses import RebelLoss
from rlhf_pl.cli.given_options import GivenOptions
from rlhf_pl.cli.short_help import RUN, SECTIONS, option_names
from rlhf_pl.modules import optimizers
from rlhf_pl.modules.optimizers import AdamW

LOGGERS = ("TensorBoardLogger", "CSVLogger", "WandbLogger", "MLFlowLogger")
_MODULES = {  # of further classes, by the option that takes them
    "optimizer": [optim],
    "lr_scheduler": [optim.lr_scheduler, optimizers],
    "callbacks": [callbacks],
}
_NO_CLASS = re.compile(r"^\s*- Expected a dot import path string: (\S+)$", re.MULTILINE)
_NO_PATH = re.compile(r"^\s*- Expected a path but \S+ either not accessible or invalid\n", re.MULTILINE)
_NO_OPTION = re.compile(
    r"^((Subcommand 'fit' does not accept o|O)ption '(?P<key>\S+)'( is not accepted)?"
    r"|unrecognized arguments: --(?P<flag>[^\s=]+).*)$"
)


def explain(message: str, given: GivenOptions | None = None) -> str:
    """A parser's message about an unknown class or option, with the names that are close to it.

    Args:
        message: The parser's message.
        given: The command line; None if it is not known.
    """
    if (found := _NO_CLASS.search(message)) is not None:
        key = re.search(r'Parser key "(\S+)"', message)
        where = f"`{(given or GivenOptions()).full_name(key[1], found[1])}`: " if key else ""
        return f"{where}there is no class {found[1]!r}{did_you_mean(close_to(found[1], _class_names(where)))}"
    if (found := _NO_OPTION.match(message)) is not None:
        group = "key" if found["key"] else "flag"
        wrong, (start, end) = found[group], found.span(group)
        if given is not None and (refused := given.who_refuses(wrong)) is not None:
            return _explain_refused(*refused)
        full = wrong if given is None else given.full_name(wrong)
        return message[:start] + full + message[end:] + did_you_mean(_options_like(full))
    return _NO_PATH.sub("", message)


def _explain_refused(name: str, kind: type) -> str:
    """An option that a class does not have."""
    option, _, last = name.rpartition(".")
    like = [f"{option}.{each}" for each in close_to(last, inspect.signature(kind).parameters)]
    return (
        f"`{name}`: {kind.__name__} has no option {last!r}{did_you_mean(like) or '.'} "
        f"{explained_by(option, kind, 'its options')}"
    )


def explained_by(option: str, kind: type, what: str) -> str:
    """A sentence on the command that explains options of a class."""
    name = kind.__name__ if kind.__module__.startswith("rlhf_pl.") else f"{kind.__module__}.{kind.__name__}"
    return f"`rlhf-pl fit --{option.partition('[')[0]}.help {name}` explains {what}."


def _class_names(where: str) -> list[str]:
    """Names of classes that an option may have; `where` contains its name."""
    names = [*(name for name in rlhf_pl.__all__ if name[0].isupper()), *LOGGERS]
    for option, modules in _MODULES.items():
        if option in where:
            names += [name for module in modules for name, kind in vars(module).items() if isinstance(kind, type)]
    return names


def _options_like(wrong: str) -> list[str]:
    """Options with the same last name, else those whose full or last name is close."""
    names = [*RUN, *(f"trainer.{name}" for name in inspect.signature(L.Trainer).parameters)]
    for key, kind in SECTIONS.items():
        names += option_names(key, kind)
    names += [f"model.optimizer.{name}" for name in inspect.signature(AdamW).parameters if name != "params"]
    names += [f"model.loss.{name}" for name in inspect.signature(RebelLoss).parameters]
    last = wrong.rpartition(".")[2]
    same = [name for name in names if name.rpartition(".")[2] == last]
    by_last = {name.rpartition(".")[2]: name for name in names}
    close = same or close_to(wrong, names) or [by_last[name] for name in close_to(last, by_last)]
    return [f"--{name}" for name in close]


def close_to(wrong: str, names: Iterable[str]) -> list[str]:
    """Names that are spelt alike, or begin alike, whatever the case; the closest first."""
    by_lower = {name.lower(): name for name in names}
    close = difflib.get_close_matches(wrong.lower(), by_lower, n=3, cutoff=0.7)
    close += [name for name in by_lower if name.startswith(wrong.lower()) and name not in close]
    return [by_lower[name] for name in close][:3]


def did_you_mean(names: list[str]) -> str:
    """The end of a sentence that names them; empty for none."""
    return f". Did you mean {' or '.join(names)}?" if names else ""
