"""Short descriptions and hashes that tell whether a stored round was made from the same things."""

import ast
import contextlib
import hashlib
import inspect
import json
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from rlhf_pl.utils.public_names import public_name
from rlhf_pl.utils.secrets import redacted

_WORDS = 251  # a prime, so that rows that change places are noticed


def weights_fingerprint(weights: Iterable[tuple[str, Tensor]]) -> str:
    """A short hash that changes with any weight, whatever order they come in and whatever device they are on."""
    lines = [name + _sums(tensor.detach()) for name, tensor in weights]
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()[:16]


def _sums(tensor: Tensor) -> str:
    """Of the tensor's bytes as whole numbers, every 251st together: exact in any order, and as fast as memory."""
    data = tensor.contiguous().flatten().view(torch.uint8)
    if data.storage_offset() % 8:
        data = data.clone()
    whole = len(data) - len(data) % (8 * _WORDS)
    sums = data[:whole].view(torch.int64).view(-1, _WORDS).sum(0)
    return repr((sums.tolist(), data[whole:].tolist()))


def rows_fingerprint(rows: Iterable[Any]) -> str:
    """A short hash of rows, in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, default=str).encode())
    return digest.hexdigest()[:16]


def describe(thing: Any, *ignore: str) -> str:
    """A class and its public settings that are plain values, as `rlhf_pl.RebelLoss(eta=1.0)`; no secrets."""
    values = {k: v for k, v in vars(thing).items() if _is_plain(v) and not k.startswith("_") and k not in ignore}
    listed = ", ".join(f"{name}={value!r}" for name, value in sorted(redacted(values).items()))
    return f"{public_name(type(thing))}({listed})"


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values())) and all(isinstance(key, str) for key in value)
    return value is None or isinstance(value, str | int | float | bool)


def code_fingerprint(function: Callable[..., Any]) -> str:
    """A short hash of a function's source, of what it uses from its own module, and of its defaults and closure.

    Values of a module are taken as they are written in its source, not as they are: a cache that fills up is no change.
    """
    digest = hashlib.sha256()
    seen: set[Any] = set()
    todo: list[Callable[..., Any]] = [function]
    while todo:
        thing = inspect.unwrap(todo.pop())
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        try:
            digest.update(inspect.getsource(thing).encode())
        except (OSError, TypeError):
            digest.update(getattr(thing, "__qualname__", type(thing).__qualname__).encode())
        if not inspect.isfunction(thing):
            continue
        for value in (*(thing.__defaults__ or ()), *_cells(thing)):
            if callable(value):
                todo.append(value)
            elif _is_plain(value) and not isinstance(value, list | dict):
                digest.update(repr(value).encode())
        for name in thing.__code__.co_names:
            value = thing.__globals__.get(name)
            if callable(value) and getattr(value, "__module__", None) == thing.__module__:
                todo.append(value)
            elif name in thing.__globals__ and not callable(value) and (thing.__module__, name) not in seen:
                seen.add((thing.__module__, name))
                digest.update(_assignment(thing, name).encode())
    return digest.hexdigest()[:16]


def _cells(function: Any) -> list[Any]:
    cells = []
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # not filled yet
            cells.append(cell.cell_contents)
    return cells


def _assignment(function: Any, name: str) -> str:
    """The source of `name = ...` at the top of the function's module, if it is there."""
    try:
        source = inspect.getsource(inspect.getmodule(function))  # type: ignore[arg-type]
        for node in ast.parse(source).body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return ast.get_source_segment(source, node) or name
    except (OSError, TypeError, SyntaxError):
        pass
    return name
