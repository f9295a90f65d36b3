"""The error for mistakes a user can mend, and checks that raise it."""

import math

from rlhf_pl.utils.secrets import redact


class InputError(Exception):
    """A mistake in a config, a data file, a reward or a model folder.

    The message names the thing in backticks, says what is required and what arrived, and how to mend it. The command
    line prints it without a traceback and exits with code 1. Secrets are left out of it.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(redact(message))


MAX_WORKERS = 256
# of a reward, a component or a margin in size, reward units: its square, times that of an `eta` up to 1e6, is a float32
LARGEST_REWARD = 1e12


def at_least(group: str, **options: tuple[float | None, float]) -> None:
    """Raise InputError for the first option whose value is below its least one, or infinite; None is taken."""
    finite(group, **{name: value for name, (value, _) in options.items()})
    for name, (value, least) in options.items():
        if value is not None and not value >= least:
            raise InputError(f"`{group}.{name}` must be {least} or more, got {value}.")
        if name == "num_workers" and value is not None and value > MAX_WORKERS:
            raise InputError(
                f"`{group}.num_workers` starts a process each; it must be at most {MAX_WORKERS}, got {value}."
            )


def finite(group: str, **options: float | None) -> None:
    """Raise InputError for the first option of a group whose value is NaN or infinite; None is taken."""
    for name, value in options.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"`{group}.{name}` must be a finite number, got {value}.")
