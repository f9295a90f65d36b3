"""The error for wrong inputs that a user can correct, and checks that raise it."""

import math

from rlhf_pl.utils.secrets import redact


class InputError(Exception):
    """A user error in a config, a data file, a reward or a model folder.

    The message names the thing in backticks, what is required, what was given, and the remedy. The command line prints
    it without a traceback and exits with code 1. Secrets are removed from it.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(redact(message))


def first_line(error: BaseException) -> str:
    """The first line of an error's text, without its full stop; the name of its class if it has no text."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def describe_error(error: BaseException) -> str:
    """The class of an error, and the first line of its text."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


MAX_WORKERS = 256
# largest absolute value of a reward, a component or a margin, reward units: its square times that of an `eta` up to
# 1e6 is still a float32
LARGEST_REWARD = 1e12


def check_at_least(group: str, **options: tuple[float | None, float]) -> None:
    """Raise InputError for the first option of a group that is below its minimum or not finite; None is allowed.

    Args:
        group: Name of the group.
        **options: (value, minimum) by option.
    """
    check_finite(group, **{name: value for name, (value, _) in options.items()})
    for name, (value, minimum) in options.items():
        if value is not None and not value >= minimum:
            raise InputError(f"`{group}.{name}` must be {minimum} or more, got {value}.")
        if name == "num_workers" and value is not None and value > MAX_WORKERS:
            raise InputError(
                f"`{group}.num_workers` is a number of processes; it must be at most {MAX_WORKERS}, got {value}."
            )


def check_finite(group: str, **options: float | None) -> None:
    """Raise InputError for the first option of a group whose value is NaN or infinite; None is allowed."""
    for name, value in options.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"`{group}.{name}` must be a finite number, got {value}.")
