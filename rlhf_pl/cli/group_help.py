"""`--X.help` of options that are groups: sections such as `checkpoint`, and settings such as `model.lora`.

jsonargparse has such a help for options that take a class, and needs the class's name there.
"""

import dataclasses
import inspect
import re
from collections.abc import Iterator, Sequence
from typing import Any, get_args, get_type_hints

import lightning as L
from jsonargparse import ArgumentParser

import rlhf_pl
from rlhf_pl.cli.short_help import SECTIONS

_OPTION = re.compile(r"--(?P<option>[\w.]+)\.help(=(?P<name>.*))?")


def group_help(argv: Sequence[str]) -> str | None:
    """The help that a command line asks for; None if it asks for none, or for one that jsonargparse makes.

    Args:
        argv: The command line. A class that it chooses, such as `--model PPOModule`, has the group.
    """
    for number, argument in enumerate(argv):
        if (found := _OPTION.fullmatch(argument)) is None:
            continue
        following = argv[number + 1 : number + 2]
        name = found["name"] or (following[0] if following and not following[0].startswith("-") else None)
        kind = _find_class(found["option"], argv)
        if kind is None or name not in (None, kind.__name__):
            return None
        is_group = dataclasses.is_dataclass(kind) or found["option"] in SECTIONS.keys() - {"model", "data"}
        if name is None or is_group or _is_made_by_run(found["option"]):
            return _describe(found["option"], kind)
    return None


def _find_class(option: str, argv: Sequence[str]) -> type | None:
    """The class whose parameters are the options of a group; None if it is not known."""
    section, *parts = option.split(".")
    if option == "trainer":
        return L.Trainer
    kind = _chosen(section, argv) or SECTIONS.get(section)
    path = section
    for part in parts:
        path += f".{part}"
        parameter = None if kind is None else inspect.signature(kind).parameters.get(part)
        if kind is None or parameter is None:
            return None
        annotation = get_type_hints(kind.__init__).get(part)  # type: ignore[misc]
        settings = (each for each in _classes(annotation) if dataclasses.is_dataclass(each))
        kind = _chosen(path, argv) or next(settings, None) or _class_of_default(kind, parameter.default)
    return kind


def _chosen(option: str, argv: Sequence[str]) -> type | None:
    """The class of this package that a command line names for an option."""
    for number, argument in enumerate(argv):
        name, _, value = argument.partition("=")
        if name == f"--{option}":
            value = value or "".join(argv[number + 1 : number + 2])
            found = getattr(rlhf_pl, value.removeprefix("rlhf_pl."), None)
            return found if isinstance(found, type) else None
    return None


def _classes(annotation: Any) -> Iterator[type]:
    """The classes in a type such as `LoRA | None`."""
    if isinstance(annotation, type):
        yield annotation
    for each in get_args(annotation):
        yield from _classes(each)


def _class_of_default(kind: Any, default: Any) -> type | None:
    """The class of a default value, or the one that a default such as `lambda p: AdamW(p)` calls."""
    if inspect.isfunction(default):
        found = default.__globals__.get(default.__code__.co_names[0])
        return found if isinstance(found, type) else None
    is_simple = default is None or default is inspect.Parameter.empty or type(default).__module__ == "builtins"
    return None if is_simple else type(default)


def _is_made_by_run(option: str) -> bool:
    """Whether the run gives the class its first argument: the parameters, or the optimizer."""
    return option.endswith((".optimizer", ".lr_scheduler"))


def _describe(option: str, kind: type) -> str:
    parser = ArgumentParser()
    skip = {"params", "optimizer"} & inspect.signature(kind).parameters.keys() if _is_made_by_run(option) else set()
    parser.add_class_arguments(kind, option, fail_untyped=False, skip=set(skip))
    options = parser.format_help().split("\n\n", 2)[-1]
    options = re.sub(rf"^ *--{re.escape(option)} CONFIG.*\n( {{20,}}.*\n)*", "", options, flags=re.MULTILINE)
    return f"usage: rlhf-pl fit --{option}.OPTION VALUE ... (options of {kind.__name__})\n\n{options}"
