"""Short errors for a wrong command line, instead of a page of usage."""

import argparse
import sys
import textwrap
from typing import Any, NoReturn

from rlhf_pl.utils.terminal import print_error, print_traceback, shows_tracebacks

MAX_ERROR_LINES = 12
FOR_ALL_COMMANDS = """
options of every command:
  --traceback           show where in the code a wrong input was detected, before the message
"""


class CommandParser(argparse.ArgumentParser):
    """The parser of a command without a config. Its `prog` ends with the command's name.

    Args:
        example: Command lines that the help begins with, after the usage; empty for none.
        **options: As in argparse.
    """

    def __init__(self, *, example: str = "", **options: Any) -> None:
        self.example = example
        super().__init__(formatter_class=_OneColumn, **options)

    def format_help(self) -> str:
        usage, _, rest = super().format_help().partition("\n\n")
        example = "\n\n" + textwrap.indent(self.example.strip(), "  ") if self.example else ""
        return f"{usage}{example}\n\n{rest}" + FOR_ALL_COMMANDS

    def error(self, message: str) -> NoReturn:
        exit_with_error(message, self.prog.split()[-1])


class _OneColumn(argparse.HelpFormatter):
    """argparse's help, with room for our options' names."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34)


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
