"""Short errors for a wrong command line, instead of a page of usage."""

import argparse
import sys
from typing import NoReturn

from rlhf_pl.utils.terminal import print_error, print_traceback, shows_tracebacks

MAX_ERROR_LINES = 12
FOR_ALL_COMMANDS = """
options of every command:
  --traceback           show where in the code a wrong input was detected, before the message
"""


class CommandParser(argparse.ArgumentParser):
    """The parser of a command without a config. Its `prog` ends with the command's name."""

    def format_help(self) -> str:
        return super().format_help() + FOR_ALL_COMMANDS

    def error(self, message: str) -> NoReturn:
        exit_with_error(message, self.prog.split()[-1])


def exit_with_error(message: str, command: str, error: BaseException | None = None) -> NoReturn:
    """Print the relevant lines of a parser's message, and exit with code 2.

    Args:
        message: The parser's message.
        command: Name of the command.
        error: The exception behind the message, for `--traceback`.
    """
    lines = list(dict.fromkeys(line for line in message.splitlines() if not _is_noise(line)))
    if len(lines) > MAX_ERROR_LINES:
        lines = [*lines[: MAX_ERROR_LINES - 1], "  ..."]
    if error is not None and shows_tracebacks():
        print_traceback(error)
    print_error("\n".join(lines).strip())
    print(f"`rlhf-pl {command} --help` lists the options.", file=sys.stderr)
    sys.exit(2)


def _is_noise(line: str) -> bool:
    """Whether a line is about types that the value does not have to match."""
    text = line.strip()
    alternatives = ("Subtypes: [", "Subclass types expect", "- a class path (str)", "- a dict w")
    return text.startswith(("Given value type:", "Given value: NestedArg", *alternatives)) or "NoneType" in text
