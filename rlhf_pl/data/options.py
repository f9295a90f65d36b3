"""Checks of the DataModules' options."""

from rlhf_pl.errors import InputError

MAX_WORKERS = 256


def at_least(**options: tuple[int | None, int]) -> None:
    """Raise InputError for the first option whose value is below its least one; None is taken."""
    for name, (value, least) in options.items():
        if value is not None and value < least:
            raise InputError(f"`data.{name}` must be {least} or more, got {value}.")
        if name == "num_workers" and value is not None and value > MAX_WORKERS:
            raise InputError(
                f"`data.num_workers` starts a process each; it must be at most {MAX_WORKERS}, got {value}."
            )
