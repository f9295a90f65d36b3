"""Converts checkpoints to JSON and back, so that the repository needs no pickles."""

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch


def to_json(value: Any) -> Any:
    """A checkpoint's content as JSON. Numbers have enough digits to be restored exactly.

    Raises:
        TypeError: A value has an unknown type.
    """
    if isinstance(value, torch.Tensor):
        numbers = value.flatten().numpy()
        return {"dtype": str(value.dtype), "shape": list(value.shape), "values": [_number(n) for n in numbers]}
    if isinstance(value, dict):  # as pairs, since keys may not be strings
        pairs = [[to_json(key), to_json(item)] for key, item in value.items()]
        return {"ordered" if isinstance(value, OrderedDict) else "dict": pairs}
    if type(value) is tuple:
        return {"tuple": [to_json(item) for item in value]}
    if type(value) is list:
        return [to_json(item) for item in value]
    if isinstance(value, float):
        return {"float": repr(value)}
    if value is None or isinstance(value, str | int | bool):
        return value
    raise TypeError(f"{type(value)}: {value!r}")


def _number(value: Any) -> Any:
    return float(str(value)) if isinstance(value, np.floating) else value.item()


def from_json(value: Any) -> Any:
    """The inverse of `to_json`."""
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "dtype" in value:
        dtype = getattr(torch, value["dtype"].removeprefix("torch."))
        return torch.tensor(value["values"], dtype=dtype).reshape(value["shape"])
    [(kind, content)] = value.items()
    if kind == "float":
        return float(content)
    if kind == "tuple":
        return tuple(from_json(item) for item in content)
    found = {from_json(key): from_json(item) for key, item in content}
    return OrderedDict(found) if kind == "ordered" else found


def write_json(content: Any, file: Path) -> None:
    """Write a checkpoint's content as JSON."""
    file.write_text(json.dumps(to_json(content), separators=(",", ":")) + "\n")


def read_json(file: Path) -> Any:
    """Read a checkpoint's content from a file of `write_json`."""
    return from_json(json.loads(file.read_text()))
