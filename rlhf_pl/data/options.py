"""Checks of the DataModules' options and states."""

from typing import Any

from rlhf_pl.utils.errors import InputError


def refuse_other_rows(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise InputError if a checkpoint was trained on other rows."""
    if before != now:
        raise InputError(
            "This run directory was trained on other data than the config now gives. Give this run a directory of its "
            "own (--trainer.default_root_dir DIR), or remove the old one to train anew."
        )


def check_module(module: Any, data: Any, wanted: str) -> None:
    """Raise InputError if a DataModule is asked to feed another module than the one its batches are for."""
    if wanted not in (kind.__name__ for kind in type(module).__mro__):
        raise InputError(f"`data`: {type(data).__name__} is for {wanted}, and `model` is {type(module).__name__}.")
