"""A parser's messages about wrong values in one sentence: the option, its value, and what it must be."""

import ast
import os
import re
import sys
from collections.abc import Sequence

from rlhf_pl.cli.given_options import GivenOptions
from rlhf_pl.cli.suggestions import close_to, did_you_mean, explained_by

_KEY = re.compile(r'^Parser key "(\S+)"')
_EXPECTED = re.compile(r"^\s*(?:- )?Expected an? (.+?)(?:\. Got value: .*)?$", re.MULTILINE)
_VALUE = re.compile(r"(?:Got|Given) value: (.*)$", re.MULTILINE)
_CLASS = re.compile(r"Problem with given class_path '(\S+)':\n\s*(.*)")
_CALLABLE = re.compile(r"expects a function or a callable class: (.*)\. Got value: (\S+)")
_IMPORT_PATH = re.compile(r"^(path but|dot import path)")
_REQUIRED = re.compile(r"^the following arguments are required: ([\w, ]+)$")
_MANY = 4  # choices, above which those like the given one are named
_TYPES = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "text", "NoneType": "null"}
_TYPES |= {"list": "a list such as [a, b]", "tuple": "a list such as [a, b]", "dict": "a mapping such as {a: b}"}


def explain_value(message: str, given: GivenOptions) -> str | None:
    """The sentence; None for a message about something else, or about values that have no short description.

    Args:
        message: The parser's message.
        given: The command line.
    """
    if (required := _REQUIRED.match(message)) is not None:
        return _explain_required(required[1].split(", "), given)
    if (key := _KEY.match(message)) is None:
        return None
    if (wrong := _CLASS.search(message)) is not None:
        return _explain_class(given.full_name(key[1], wrong[1]), wrong[1], wrong[2].strip())
    if (wrong := _CALLABLE.search(message)) is not None:
        return _explain_class(given.full_name(key[1], wrong[2]), wrong[2], wrong[1])
    value, expected = _VALUE.search(message), _EXPECTED.findall(message)
    if value is None or not expected:
        return None
    if "<class 'float'>" in expected:  # or a tensor, which no config can give
        expected = [each for each in expected if not _IMPORT_PATH.match(each)]
    allowed, choices = _allowed(expected, "typing.Literal[64" in message)
    if not allowed:
        return None
    name = given.full_name(key[1], value[1])
    hint = did_you_mean(close_to(value[1], choices)) if len(choices) > _MANY else ""
    return f"`{name}` is {value[1]!r}, but must be {allowed}" + (hint or ".")


def _allowed(expected: Sequence[str], numbers_are_choices: bool) -> tuple[str, list[str]]:
    """What a value must be, in words, and its choices; empty if a type has no short description.

    Args:
        expected: The types, as the parser writes them.
        numbers_are_choices: Whether an integer is one of a few choices, which are among the others as text.
    """
    words, choices = [], []
    for each in expected:
        if (literal := re.fullmatch(r"typing\.Literal(\[.*\])", each)) is not None:
            choices += [str(choice) for choice in ast.literal_eval(literal[1])]
        elif (kind := re.fullmatch(r"<class '(\w+)'>", each)) is not None and kind[1] in _TYPES:
            words += [] if kind[1] == "int" and numbers_are_choices else [_TYPES[kind[1]]]
        else:
            return "", []
    words += choices if len(choices) <= 1 else [f"one of {', '.join(choices)}"]
    words.sort(key=lambda word: word == "null")
    return (", or " if len(choices) > 1 else " or ").join(dict.fromkeys(words)), choices


def _explain_class(name: str, path: str, reason: str) -> str | None:
    """A class that can't be imported; None for one that refuses its arguments."""
    module, _, kind = path.rpartition(".")
    if reason == f"module '{module}' has no attribute '{kind}'":
        content = vars(sys.modules[module]) if module in sys.modules else {}
        classes = [each for each, value in content.items() if isinstance(value, type)]
        there = did_you_mean(close_to(kind, classes)) or "."
        return f"`{name}` is {path!r}, but the module {module!r} has no class {kind!r}{there}"
    if (missing := re.fullmatch(r"No module named '(\S+)'", reason)) is None:
        return None
    if f"{module}.".startswith(f"{missing[1]}."):
        return (
            f"`{name}` is {path!r}, but there is no module {missing[1]!r} in {os.getcwd()} or among the installed "
            "packages. Give the class as module.Class."
        )
    return f"`{name}` is {path!r}, whose module {module!r} imports {missing[1]!r}, which is not installed."


def _explain_required(names: Sequence[str], given: GivenOptions) -> str | None:
    if (found := given.who_requires(names)) is None:
        return None
    option, kind = found
    listed = ", ".join(f"`{option}.{name}`" for name in names)
    flags = " ".join(f"--{option}.{name} {name.upper()}" for name in names)
    in_file = " and ".join(f"`{option}.init_args.{name}`" for name in names)
    add = f"Add {in_file}" if "[" in option else f"Add {flags}, in a config file {in_file}"
    it = "it" if len(names) == 1 else "them"
    return f"{listed}: {kind.__name__} requires {it}. {add}. {explained_by(option, kind, it)}"
