"""Short descriptions and hashes, to check whether a stored round was created from the same inputs."""

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

_NUM_SUMS = 251  # a prime, so that a change in the order of rows changes the sums


def weights_fingerprint(weights: Iterable[tuple[str, Tensor]]) -> str:
    """A short hash of all weights, independent of their order and device."""
    lines = [name + _sums(tensor.detach()) for name, tensor in weights]
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()[:16]


def _sums(tensor: Tensor) -> str:
    """Sums over a tensor's bytes as integers with stride 251: exact in any order, and limited by memory bandwidth."""
    data = tensor.contiguous().flatten().view(torch.uint8)
    if data.storage_offset() % 8:
        data = data.clone()
    whole = len(data) - len(data) % (8 * _NUM_SUMS)
    sums = data[:whole].view(torch.int64).view(-1, _NUM_SUMS).sum(0)
    return repr((sums.tolist(), data[whole:].tolist()))


def rows_fingerprint(rows: Iterable[Any]) -> str:
    """A short hash of rows, which depends on their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, default=str).encode())
    return digest.hexdigest()[:16]


def describe(thing: Any, *ignore: str) -> str:
    """Describe an object by its class and its public plain values, such as `rlhf_pl.RebelLoss(eta=1.0)`.

    Args:
        thing: The object. Secrets in its values are hidden.
        *ignore: Names of values to leave out.
    """
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
    """A short hash of a function's source, of the names it uses from its own module, and of its defaults and closure.

    A module's values are hashed by their source, not by their current state, so a growing cache does not change it.
    """
    digest = hashlib.sha256()
    seen: set[Any] = set()
    pending: list[Callable[..., Any]] = [function]
    while pending:
        thing = inspect.unwrap(pending.pop())
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        try:
            digest.update(inspect.getsource(thing).encode())
        except (OSError, TypeError):
            digest.update(getattr(thing, "__qualname__", type(thing).__qualname__).encode())
        if not inspect.isfunction(thing):
            continue
        for value in (*(thing.__defaults__ or ()), *_closure_values(thing)):
            if callable(value):
                pending.append(value)
            elif _is_plain(value) and not isinstance(value, list | dict):
                digest.update(repr(value).encode())
        for name in thing.__code__.co_names:
            value = thing.__globals__.get(name)
            if callable(value) and getattr(value, "__module__", None) == thing.__module__:
                pending.append(value)
            elif name in thing.__globals__ and not callable(value) and (thing.__module__, name) not in seen:
                seen.add((thing.__module__, name))
                digest.update(_assignment(thing, name).encode())
    return digest.hexdigest()[:16]


def _closure_values(function: Any) -> list[Any]:
    values = []
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # an empty cell
            values.append(cell.cell_contents)
    return values


def _assignment(function: Any, name: str) -> str:
    """The source of `name = ...` at the top level of the function's module, or `name` if there is none."""
    try:
        source = inspect.getsource(inspect.getmodule(function))  # type: ignore[arg-type]
        for node in ast.parse(source).body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return ast.get_source_segment(source, node) or name
    except (OSError, TypeError, SyntaxError):
        pass
    return name
