"""JSON that users write, in which no object has a key twice."""

import json
from typing import Any


class DuplicateKeyError(ValueError):
    """An object has a key twice: which of its values is meant, nobody can tell."""


def loads(text: str) -> Any:
    """What JSON text holds.

    Raises:
        DuplicateKeyError: An object has a key twice.
        ValueError: It is no JSON.
    """
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise DuplicateKeyError(f"the key {twice[:60]!r} is given twice in one object; merge the two")
    return found
