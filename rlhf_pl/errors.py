"""The error for mistakes a user can mend, and a check that raises it."""

from rlhf_pl.secrets import redact


class InputError(Exception):
    """A mistake in a config, a data file, a reward or a model folder.

    The message names the thing in backticks, says what is required and what arrived, and how to mend it. The command
    line prints it without a traceback and exits with code 1. Secrets are left out of it.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(redact(message))


MAX_WORKERS = 256


def at_least(group: str, **options: tuple[float | None, float]) -> None:
    """Raise InputError for the first option of a group whose value is below its least one; None is taken."""
    for name, (value, least) in options.items():
        if value is not None and not value >= least:
            raise InputError(f"`{group}.{name}` must be {least} or more, got {value}.")
        if name == "num_workers" and value is not None and value > MAX_WORKERS:
            raise InputError(
                f"`{group}.num_workers` starts a process each; it must be at most {MAX_WORKERS}, got {value}."
            )
