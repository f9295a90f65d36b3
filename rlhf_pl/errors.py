"""The error for mistakes a user can mend."""


class InputError(Exception):
    """A mistake in a config, a data file, a reward or a model folder.

    The message names the thing in backticks, says what is required and what arrived, and how to mend it. The command
    line prints it without a traceback and exits with code 1.
    """
