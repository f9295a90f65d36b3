"""Strict reading of YAML that users write. Errors name the file and the line."""

from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from jsonargparse import _loaders_dumpers, _util

from rlhf_pl.utils.errors import InputError, first_line
from rlhf_pl.utils.public_names import with_public_paths

MAX_DEPTH = 100  # of nested values
MAX_ALIASED = 10_000  # values that aliases expand to
_MERGE = "tag:yaml.org,2002:merge"


def load_yaml(text: str, path: str = "") -> Any:
    """Parse a config file or an option's value as jsonargparse does, with the public names of this package's classes.

    Duplicate keys in one mapping, recursive aliases, aliases that expand to more than 10,000 values, and values nested
    more than 100 deep are errors.

    Args:
        text: YAML or JSON.
        path: Name of the file, if jsonargparse passes it.

    Raises:
        InputError: The text of a file is invalid. The message names file and line.
        YAMLError: The value of an option is not valid YAML; it may be plain text.
    """
    try:
        _check_events(text)
        _check_keys(yaml.compose(text, Loader=_loaders_dumpers.get_yaml_default_loader()))
        value = with_public_paths(_loaders_dumpers.yaml_load(text))
    except yaml.YAMLError as error:
        if (file := _file_of(text)) is None:
            raise
        raise InputError(f"{file}{_describe(error)}") from error
    if path and not isinstance(value, dict):
        file = _file_of(text) or Path(path)
        raise InputError(f"{file} holds {type(value).__name__}; expected options, a line each: `name: value`.")
    return value


def _check_events(text: str) -> None:
    """Refuse recursive aliases, and aliases and nesting beyond the limits, without building values."""
    sizes: dict[str, int] = {}
    opened: list[tuple[str | None, int]] = []  # anchor, and number of values before it
    count = aliased = 0
    for event in yaml.parse(text, Loader=_loaders_dumpers.get_yaml_default_loader()):
        anchor = getattr(event, "anchor", None)
        if isinstance(event, yaml.AliasEvent):
            if any(anchor == name for name, _ in opened):
                raise _problem(event, f"the alias `*{anchor}` is inside of the value that it refers to")
            aliased += sizes.get(anchor or "", 0)
            count += sizes.get(anchor or "", 0)
            if aliased > MAX_ALIASED:
                raise _problem(event, f"aliases expand to more than {MAX_ALIASED:,} values")
        elif isinstance(event, yaml.CollectionStartEvent):
            opened.append((anchor, count))
            count += 1
            if len(opened) > MAX_DEPTH:
                raise _problem(event, f"values are nested more than {MAX_DEPTH} deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            if anchor is not None:
                sizes[anchor] = count - before
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
            if anchor is not None:
                sizes[anchor] = 1


def _check_keys(root: yaml.Node | None) -> None:
    """Refuse duplicate keys in one mapping. Keys that `<<` merges may be overridden."""
    pending, seen = [root], set()
    while pending:
        node = pending.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            pending += node.value
        if not isinstance(node, yaml.MappingNode):
            continue
        lines: dict[tuple[str, Any], int] = {}
        for key, value in node.value:
            pending += [key, value]
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
                if (line := lines.get((key.tag, key.value))) is not None:
                    raise _problem(key, f"`{key.value}` is given twice, first in line {line}; merge the two")
                lines[key.tag, key.value] = key.start_mark.line + 1


def _problem(place: yaml.Event | yaml.Node, text: str) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(problem=text, problem_mark=place.start_mark)


def _describe(error: yaml.YAMLError) -> str:
    """Describe a YAML error as `, line 3: problem.`."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    return f"{f', line {mark.line + 1}' if mark else ''}: {problem or first_line(error)}."


def _file_of(text: str) -> Path | None:
    """The config file that jsonargparse reads, if `text` is its whole content; None for the value of an option."""
    opened = _util.config_load_stack.get()
    if not opened or not (file := Path(opened[-1][0])).is_file():
        return None
    return Path(opened[-1][1]) if file.read_text(encoding="utf-8", errors="replace") == text else None
