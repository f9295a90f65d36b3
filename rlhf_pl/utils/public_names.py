"""Public names of this package's classes, such as `rlhf_pl.RebelLoss`, independent of their files.

Manifests, fingerprints and configs use these names, so that a class can move to another file without a change to runs.
Earlier versions wrote names with files (`rlhf_pl.<file>.RebelLoss`), which are mapped when they are read. The names are
found in the package's source, without imports.
"""

import os
import re
from functools import cache
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[1]
_CLASS = re.compile(r"^class ([A-Z]\w*)", re.MULTILINE)
_EXPORTS = re.compile(r"^__all__ = [\[(](.*?)[\])]", re.MULTILINE | re.DOTALL)
# path of a class; modules of `by_path` are users' files
_PATH = rf"{_ROOT.name}\.(?!(?:\w+\.)*by_path\.)(?:[a-z_]\w*\.)*([A-Z]\w*)"
_WHOLE_PATH = re.compile(_PATH)
_LISTED = re.compile(rf"(?<![\w.]){_PATH}(?![\w.])")
_DESCRIBED = re.compile(rf"(?<![\w.]){_PATH}(?=\()")  # start of a text from `fingerprints.describe`


def public_name(kind: type) -> str:
    """The shortest import path of a class, such as `rlhf_pl.RebelLoss`. Users' classes have only their own."""
    return public_path(f"{kind.__module__}.{kind.__qualname__}")


def public_path(path: str) -> str:
    """The public name of a class of this package, given any present or former path. Other texts are unchanged."""
    found = _WHOLE_PATH.fullmatch(path)
    return path if found is None else _public_names().get(found[1], path)


def with_public_path(argument: str) -> str:
    """Replace paths by public names in a command-line argument, `VALUE` or `--name=VALUE`; YAML may contain paths."""
    option, sign, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
    if value.startswith(("{", "[")):
        return option + sign + _LISTED.sub(lambda found: public_path(found[0]), value)
    return option + sign + public_path(value)


def with_public_paths(config: Any) -> Any:
    """Replace texts in a config that are paths of this package's classes by their public names."""
    return _map_texts(config, public_path)


def with_public_descriptions(settings: Any) -> Any:
    """Replace the paths in class descriptions, such as `rlhf_pl.<file>.RebelLoss(eta=1.0)`, by public names."""
    return _map_texts(settings, lambda text: _DESCRIBED.sub(lambda found: public_path(found[0]), text))


def _map_texts(value: Any, change: Any) -> Any:
    """Apply `change` to every text in nested mappings and lists, except keys."""
    if isinstance(value, dict):
        return {key: _map_texts(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_texts(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


@cache
def _public_names() -> dict[str, str]:
    """Each class's shortest path by name: in a module whose `__all__` lists it, or else in the one that defines it."""
    exported: dict[str, str] = {}
    defined: dict[str, str] = {}
    for module, text in sorted(_read_sources(), key=lambda found: (found[0].count("."), found[0])):
        listed = _EXPORTS.search(text)
        for name in re.findall(r"\w+", listed[1]) if listed else ():
            exported.setdefault(name, f"{module}.{name}")
        for name in _CLASS.findall(text):
            defined.setdefault(name, f"{module}.{name}")
    return {name: exported.get(name, path) for name, path in defined.items()}


def _read_sources() -> list[tuple[str, str]]:
    """Name and source of every module."""
    files = [
        Path(folder, name)
        for folder, _, names in os.walk(_ROOT, followlinks=True)  # `callbacks` is a link where it is not installed
        for name in names
        if name.endswith(".py")
    ]
    found = []
    for file in files:
        parts = file.relative_to(_ROOT.parent).with_suffix("").parts
        found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), file.read_text(encoding="utf-8")))
    return found
