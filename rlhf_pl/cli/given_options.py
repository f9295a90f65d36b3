"""What a command line and its config files give, to name in errors what a parser leaves out: an option's prefix."""

import inspect
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import yaml  # type: ignore[import-untyped]

# modules whose classes are named without them
_MODULES = (
    "rlhf_pl",
    "rlhf_pl.rewards",
    "rlhf_pl.optim",
    "torch.optim",
    "torch.optim.lr_scheduler",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
)


class GivenOptions:
    """The options of a command line, and those of its config files.

    Args:
        argv: The command line.
    """

    def __init__(self, argv: Sequence[str] = ()) -> None:
        self.values: dict[str, Any] = {}  # by the option's name as it is typed, such as `model.optimizer.lr`
        pairs = list(_pairs(argv))
        for name, value in pairs:
            if name in ("config", "c"):
                self.values |= dict(_flat(_read(value)))
        self.values |= {name.removesuffix("+"): value for name, value in pairs if name != "config"}

    def full_name(self, key: str, value: str | None = None) -> str:
        """The option that ends in `key`; `key` itself if none does, or several do.

        Args:
            key: The last part of an option's name, or all of it.
            value: The option's value as text; None for any.
        """
        if key in self.values:
            return key
        like = {name: given for name, given in self.values.items() if name.endswith(f".{key}")}
        found = [name for name, given in like.items() if value in (None, str(given))] or list(like)  # a part of a value
        return found[0] if len(found) == 1 else key

    def who_refuses(self, key: str) -> tuple[str, type] | None:
        """The option whose name ends in `key` that a named class does not have, and that class."""
        for name in self.values:
            option, _, last = name.rpartition(".")
            kind = _find_class(self.values.get(option)) if f".{name}".endswith(f".{key}") else None
            if kind is not None and last not in inspect.signature(kind).parameters:
                return name, kind
        return None

    def who_requires(self, names: Sequence[str]) -> tuple[str, type] | None:
        """The option that names a class with these required parameters, none of which is given, and that class."""
        for option, value in self.values.items():
            kind = _find_class(value)
            if kind is None or any(f"{option}.{name}" in self.values for name in names):
                continue
            parameters = inspect.signature(kind).parameters
            if all(name in parameters and parameters[name].default is inspect.Parameter.empty for name in names):
                return option, kind
        return None


def _pairs(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Names and values of the options."""
    for number, argument in enumerate(argv):
        if argument.startswith("--"):
            name, equals, value = argument.removeprefix("--").partition("=")
            yield name, value if equals else "".join(argv[number + 1 : number + 2])


def _read(file: str) -> Any:
    try:
        with open(file, encoding="utf-8") as opened:
            return yaml.safe_load(opened)
    except (OSError, ValueError, yaml.YAMLError):  # the parser says so
        return {}


def _flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a config by option; a class is the value of its option, and the parent of its `init_args`."""
    if not isinstance(config, dict):
        return
    for key, value in config.items():
        if key == "class_path":
            yield prefix, value
        elif key == "init_args":
            yield from _flat(value, prefix)
        else:
            name = f"{prefix}.{key}" if prefix else str(key)
            yield from _flat(value, name) if isinstance(value, dict) else [(name, value)]
            for number, item in enumerate(value if isinstance(value, list) else []):
                yield from _flat(item, f"{name}[{number}]")


def _find_class(path: Any) -> type | None:
    """The class of a name of this package or a dotted path, if its module is loaded."""
    module, _, name = str(path).rpartition(".")
    places = [sys.modules.get(place) for place in ([module] if module else _MODULES)]
    found = (getattr(place, name, None) for place in places)
    return next((each for each in found if isinstance(each, type)), None)
