"""`rlhf-pl compare RUN_A RUN_B`: whether one run's policy is better than another's, by held-out prompt. Reads only."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from rlhf_pl.cli.parser_errors import CommandParser
from rlhf_pl.rounds.report.comparison import (
    Evaluation,
    compare,
    describe_difference,
    describe_own_gain,
    describe_unlike,
    find_evaluation,
    have_one_reward,
)
from rlhf_pl.rounds.report.gain import Gain, read_gain
from rlhf_pl.rounds.report.numbers import decimals_for
from rlhf_pl.utils.console import console, warn
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.terminal import print_wrong_input

_LONG_NAME = 30  # characters of a run's name that a column has room for


def run(argv: Sequence[str]) -> int:
    """Run `rlhf-pl compare ...`. Return the exit code."""
    parser = CommandParser(
        prog="rlhf-pl compare",
        example="rlhf-pl compare runs/a runs/b\nrlhf-pl compare runs/a runs/b --after 3",
        description="Compare the policies of two runs by their rewards on the held-out prompts that both have: the "
        "mean difference by prompt, with its standard error, and each run's own gain. Reads only, also during a run.",
    )
    parser.add_argument("run_a", help="directory of the first run (`trainer.default_root_dir`)")
    parser.add_argument("run_b", help="directory of the second run")
    parser.add_argument(
        "--after",
        type=int,
        metavar="N",
        help="compare the policies after N rounds (default: each run's last evaluation)",
    )
    arguments = parser.parse_args(argv)
    try:
        if Path(arguments.run_a).resolve() == Path(arguments.run_b).resolve():
            raise InputError(
                f"{arguments.run_a!r} and {arguments.run_b!r} are the same directory: name two runs. "
                f"`rlhf-pl rounds {arguments.run_a}` shows the rounds of one."
            )
        return show(*(find_evaluation(name, arguments.after) for name in (arguments.run_a, arguments.run_b)))
    except InputError as error:
        print_wrong_input(error)
        return 1


def show(first: Evaluation, second: Evaluation) -> int:
    """Print both runs, what differs in how they were evaluated, and the difference.

    Returns:
        The exit code, 1 if they have nothing in common to be compared by.
    """
    difference = compare(first, second)
    console.print(_make_table(first, second, difference))
    for text in describe_unlike(first, second):
        warn(f"{text}.")
    if difference.before and not have_one_reward(first, second):
        return 1
    console.print(describe_difference(difference, first.name, second.name), soft_wrap=True)
    if difference.before and difference.error > 0:
        console.print(
            "± is the standard error over these prompts and their responses. Runs with another seed differ as well: "
            "take "
            "several of each before you prefer a setting.",
            soft_wrap=True,
        )
    return 0 if difference.before else 1


def _make_table(first: Evaluation, second: Evaluation, difference: Gain) -> Table:
    """A column per run: its rounds, held-out prompts, and rewards."""
    gains = [_own_gain(evaluation) for evaluation in (first, second)]
    shared = [difference.before, difference.after]
    digits = decimals_for(difference.error or 1.0)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), show_edge=False, pad_edge=False)
    for header in ("", first.name, second.name):
        table.add_column(_in_lines(header), justify="right" if header else "left", overflow="fold")
    rows = {
        "rounds": [str(evaluation.version) for evaluation in (first, second)],
        "held-out prompts": [str(gain.prompts) for gain in gains],
        "reward before": [_mean(gain.before, digits) for gain in gains],
        "reward after": [_mean(gain.after, digits) for gain in gains],
        "gain": [describe_own_gain(gain) for gain in gains],
        f"reward on the {len(difference.before)} shared": [_mean(values, digits) for values in shared],
    }
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table


def _in_lines(name: str) -> str:
    """A run's name; a long one with its last folder on a line of its own."""
    folder, slash, last = name.rpartition("/")
    return f"{folder}{slash}\n{last}" if slash and len(name) > _LONG_NAME else name


def _own_gain(evaluation: Evaluation) -> Gain:
    """The run's gain over its start, empty if that was not evaluated."""
    if evaluation.store.held_out(0).is_complete("rewards"):
        return read_gain(evaluation.store, evaluation.version)
    return Gain([], [], int(evaluation.stored.info("responses")["prompts"]))


def _mean(values: Sequence[float], digits: int) -> str:
    return f"{statistics.fmean(values):.{digits}f}" if values else "-"
