"""Refuses NaN and infinity among the options of a config, before any class is built from it."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from jsonargparse import Namespace

from rlhf_pl.utils.errors import InputError

# options for which infinity means "no limit"
UNLIMITED = ("guards.max_kl", "guards.max_length_ratio")
_CHECKED = ("rlhf_pl", "torch", "lightning", "transformers")  # packages whose other options must be finite
_ALWAYS_FINITE = ("model.optimizer", "model.lr_scheduler")  # options that must be finite for users' classes too


def refuse_not_finite(config: Any) -> None:
    """Refuse NaN anywhere in a parsed config, and infinity except where it means "no limit".

    A user's own class, such as a reward, may give infinity a meaning; NaN has none.

    Args:
        config: Nested namespaces, mappings and lists, as the parser returns them.

    Raises:
        InputError: Names the first such option.
    """
    for name, value, is_users in _floats(config, "", False):
        if math.isnan(value) or (math.isinf(value) and not is_users and not (name in UNLIMITED and value > 0)):
            raise InputError(
                f"`{name}` must be a finite number, got {value}. Infinity means no limit in "
                f"{' and '.join(f'`{option}`' for option in UNLIMITED)} only."
            )


def _floats(value: Any, name: str, is_users: bool) -> Iterator[tuple[str, float, bool]]:
    """Yield every float as (name, value, whether it is an option of a user's own class)."""
    if isinstance(value, float):
        yield name, value, is_users
    elif isinstance(value, list | tuple | set):
        for number, item in enumerate(value):
            yield from _floats(item, f"{name}[{number}]", is_users)
    elif isinstance(value, Mapping | Namespace):
        items = dict(value.items() if isinstance(value, Mapping) else vars(value))
        path = items.get("class_path")
        if isinstance(path, str):
            is_users = path.partition(".")[0] not in _CHECKED and not name.startswith(_ALWAYS_FINITE)
        for key, item in items.items():
            inside = "" if key in ("init_args", "dict_kwargs") else str(key)
            yield from _floats(item, ".".join(filter(None, (name, inside))), is_users)
