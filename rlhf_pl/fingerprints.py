"""Short descriptions and hashes that tell whether a stored round was made from the same things."""

import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def weights_fingerprint(weights: Mapping[str, Tensor]) -> str:
    """A short hash that changes with any weight, whatever device they are on."""
    digest = hashlib.sha256()
    with torch.no_grad():
        for name, tensor in weights.items():
            wide = tensor.double()
            # ten digits: the last ones depend on the order of summation, and so on the device
            digest.update(f"{name}:{wide.sum().item():.10e}:{wide.square().sum().item():.10e}".encode())
    return digest.hexdigest()[:16]


def rows_fingerprint(rows: Iterable[Any]) -> str:
    """A short hash of rows, in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, default=str).encode())
    return digest.hexdigest()[:16]


def describe(thing: Any, *ignore: str) -> str:
    """A class and those of its public settings that are plain values, as `rlhf_pl.losses.RebelLoss(eta=1.0)`."""
    kind = type(thing)
    values = {k: v for k, v in vars(thing).items() if _is_plain(v) and not k.startswith("_") and k not in ignore}
    listed = ", ".join(f"{name}={value!r}" for name, value in sorted(values.items()))
    return f"{kind.__module__}.{kind.__qualname__}({listed})"


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values())) and all(isinstance(key, str) for key in value)
    return value is None or isinstance(value, str | int | float | bool)


def code_fingerprint(function: Callable[..., Any]) -> str:
    """A short hash of a function's source, of what it uses from its own module, and of its defaults and closure."""
    digest = hashlib.sha256()
    seen: set[int] = set()
    todo: list[Any] = [function]
    while todo:
        thing = inspect.unwrap(todo.pop()) if callable(todo[-1]) else todo.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if not callable(thing):
            digest.update(repr(thing).encode() if _is_plain(thing) else type(thing).__qualname__.encode())
            continue
        try:
            digest.update(inspect.getsource(thing).encode())
        except (OSError, TypeError):
            digest.update(getattr(thing, "__qualname__", type(thing).__qualname__).encode())
        if inspect.isfunction(thing):
            todo += [*(thing.__defaults__ or ()), *(cell.cell_contents for cell in thing.__closure__ or ())]
            used = [thing.__globals__[name] for name in thing.__code__.co_names if name in thing.__globals__]
            todo += [u for u in used if not inspect.ismodule(u) and _same_module(u, thing)]
    return digest.hexdigest()[:16]


def _same_module(thing: Any, function: Any) -> bool:
    return not callable(thing) or getattr(thing, "__module__", None) == function.__module__
