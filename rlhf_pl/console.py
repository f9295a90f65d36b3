"""Progress bars and tables on the terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


def make_console() -> Console:
    """Standard output; 100 columns wide where it is no terminal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 100
    return console


console = make_console()
Advance = Callable[..., None]


def make_progress() -> Progress:
    """The layout that all bars share."""
    return Progress(
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.description:<34}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


@contextmanager
def phase(description: str, total: int = 1, unit: str = "", enabled: bool = True) -> Iterator[Advance]:
    """A progress bar for one phase.

    Args:
        description: What is being done.
        total: How many `unit`s there are.
        unit: What is counted.
        enabled: Whether to show it.

    Yields:
        `advance(count=1, note="")`. A phase of one step advances by itself when the block ends.
    """
    if not enabled:
        yield lambda count=1, note="": None
        return
    with make_progress() as progress:
        task = progress.add_task(description, total=total, unit=unit, note="")

        def advance(count: int = 1, note: str = "") -> None:
            progress.update(task, advance=count, note=note)

        yield advance
        if total == 1:
            progress.update(task, completed=1)
