"""The public names of this package's classes, such as `rlhf_pl.RebelLoss`, whatever file a class is in.

Manifests, fingerprints and configs name classes by these, so that moving a class to another file changes no run. Older
ones have the names of files in them (`rlhf_pl.<file>.RebelLoss`); they are mapped when they are read. The names come
from the package's source, so that nothing has to be imported to know them.
"""

import os
import re
from functools import cache
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[1]
_CLASS = re.compile(r"^class ([A-Z]\w*)", re.MULTILINE)
_EXPORTS = re.compile(r"^__all__ = [\[(](.*?)[\])]", re.MULTILINE | re.DOTALL)
# a class by its path; users' files are modules of `by_path`, and their classes are not ours
_PATH = rf"{_ROOT.name}\.(?!(?:\w+\.)*by_path\.)(?:[a-z_]\w*\.)*([A-Z]\w*)"
_WHOLE_PATH = re.compile(_PATH)
_LISTED = re.compile(rf"(?<![\w.]){_PATH}(?![\w.])")
_DESCRIBED = re.compile(rf"(?<![\w.]){_PATH}(?=\()")  # as `fingerprints.describe` begins


def public_name(kind: type) -> str:
    """The shortest path that a class can be imported by, as `rlhf_pl.RebelLoss`; a user's class has only its own."""
    return public_path(f"{kind.__module__}.{kind.__qualname__}")


def public_path(path: str) -> str:
    """The public name of a class of this package, by any path that it has or had; all else as it is."""
    found = _WHOLE_PATH.fullmatch(path)
    return path if found is None else _public_names().get(found[1], path)


def with_public_path(argument: str) -> str:
    """An argument of the command line, `VALUE` or `--name=VALUE`, whose value is a path or YAML with paths in it."""
    option, sign, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
    if value.startswith(("{", "[")):
        return option + sign + _LISTED.sub(lambda found: public_path(found[0]), value)
    return option + sign + public_path(value)


def with_public_paths(config: Any) -> Any:
    """A config whose texts that are paths of our classes, and nothing more, are their public names."""
    return _mapped(config, public_path)


def with_public_descriptions(settings: Any) -> Any:
    """Settings as a manifest of today has them: classes described with their arguments have their public names."""
    return _mapped(settings, lambda text: _DESCRIBED.sub(lambda found: public_path(found[0]), text))


def _mapped(value: Any, change: Any) -> Any:
    """`value` with every text in its mappings and lists changed; keys stay."""
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_mapped(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


@cache
def _public_names() -> dict[str, str]:
    """Each class's shortest path by its name: a module that lists it in `__all__`, or else the one that defines it."""
    exported: dict[str, str] = {}
    defined: dict[str, str] = {}
    for module, text in sorted(_sources(), key=lambda found: (found[0].count("."), found[0])):
        listed = _EXPORTS.search(text)
        for name in re.findall(r"\w+", listed[1]) if listed else ():
            exported.setdefault(name, f"{module}.{name}")
        for name in _CLASS.findall(text):
            defined.setdefault(name, f"{module}.{name}")
    return {name: exported.get(name, path) for name, path in defined.items()}


def _sources() -> list[tuple[str, str]]:
    """Name and text of every module."""
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
