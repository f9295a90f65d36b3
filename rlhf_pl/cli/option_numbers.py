"""NaN and infinity among the options of a config, which are refused before anything is built of it."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from jsonargparse import Namespace

from rlhf_pl.utils.errors import InputError

# where infinity means "no limit", as their docstrings say
UNLIMITED = ("guards.max_kl", "guards.max_length_ratio")
_CHECKED = ("rlhf_pl", "torch", "lightning", "transformers")  # packages none of whose other options takes one
_NO_LIMITS = ("model.optimizer", "model.lr_scheduler")  # whosever class it is


def refuse_not_finite(config: Any) -> None:
    """Refuse NaN anywhere in a parsed config, and infinity but where it means "no limit".

    What infinity means to a class of the user's own, a reward for example, is for that class to say; NaN means nothing
    anywhere.

    Args:
        config: Nested namespaces, mappings and lists, as the parser gives them.

    Raises:
        InputError: Names the first such option.
    """
    for name, value, is_theirs in _floats(config, "", False):
        if math.isnan(value) or (math.isinf(value) and not is_theirs and not (name in UNLIMITED and value > 0)):
            raise InputError(
                f"`{name}` must be a finite number, got {value}. Infinity stands for no limit in "
                f"{' and '.join(f'`{option}`' for option in UNLIMITED)} alone."
            )


def _floats(value: Any, name: str, is_theirs: bool) -> Iterator[tuple[str, float, bool]]:
    """(name, value, whether it is an option of a user's own class) of every float."""
    if isinstance(value, float):
        yield name, value, is_theirs
    elif isinstance(value, list | tuple | set):
        for number, item in enumerate(value):
            yield from _floats(item, f"{name}[{number}]", is_theirs)
    elif isinstance(value, Mapping | Namespace):
        items = dict(value.items() if isinstance(value, Mapping) else vars(value))
        path = items.get("class_path")
        if isinstance(path, str):
            is_theirs = path.partition(".")[0] not in _CHECKED and not name.startswith(_NO_LIMITS)
        for key, item in items.items():
            inside = "" if key in ("init_args", "dict_kwargs") else str(key)
            yield from _floats(item, ".".join(filter(None, (name, inside))), is_theirs)
