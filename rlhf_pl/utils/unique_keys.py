"""Reads JSON that users write, and refuses duplicate keys."""

import json
from typing import Any


class DuplicateKeyError(ValueError):
    """An object has a duplicate key, so its value is ambiguous."""


def loads(text: str) -> Any:
    """Parse JSON.

    Raises:
        DuplicateKeyError: An object has a duplicate key.
        ValueError: The text is not JSON.
    """
    return json.loads(text, object_pairs_hook=_make_object)


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise DuplicateKeyError(f"the key {twice[:60]!r} is given twice in one object; merge the two")
    return found
