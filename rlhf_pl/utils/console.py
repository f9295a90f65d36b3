"""Progress bars and tables on the terminal."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.segment import Segment
from rich.text import Text

from rlhf_pl.utils.terminal import make_printable


class SafeConsole(Console):
    """Prints any text literally: brackets are not markup, control characters are escaped and secrets hidden.

    For styles use `rich.text.Text`, or `warn` and `note` below.
    """

    def __init__(self) -> None:
        super().__init__(highlight=False, markup=False, emoji=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        if isinstance(renderable, str):
            renderable = make_printable(renderable)
        elif isinstance(renderable, Text) and (plain := make_printable(renderable.plain)) != renderable.plain:
            renderable = renderable.copy()
            renderable.plain = plain
        return super().render(renderable, options)


def make_console() -> Console:
    """A console on standard output, 100 columns wide if that is not a terminal."""
    console = SafeConsole()
    if not console.is_terminal:
        console.width = 100
    return console


console = make_console()
Advance = Callable[..., None]


def warn(text: str) -> None:
    """Print a line that starts with a yellow `warning`."""
    console.print(Text.assemble(("warning", "yellow"), ": ", text), soft_wrap=True)


def note(text: str) -> None:
    """Print a line that starts with a yellow `note`."""
    console.print(Text.assemble(("note", "yellow"), ": ", text), soft_wrap=True)


def make_progress() -> Progress:
    """A progress bar with the layout that all bars share."""
    return Progress(
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.description:<34}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
    )


@contextmanager
def phase(description: str, total: int = 1, unit: str = "", enabled: bool = True) -> Iterator[Advance]:
    """Show a progress bar for one phase.

    Args:
        description: Name of the phase.
        total: Number of `unit`s. No bar is shown for none.
        unit: Plural noun of the counted things.
        enabled: Whether to show the bar.

    Yields:
        `advance(count=1, note="")`. A phase of one step advances by itself when the block ends.
    """
    if not enabled or not total:
        yield lambda count=1, note="": None
        return
    with make_progress() as progress:
        task = progress.add_task(description, total=total, unit=unit, note="")

        def advance(count: int = 1, note: str = "") -> None:
            progress.update(task, advance=count, note=note)

        yield advance
        if total == 1:
            progress.update(task, completed=1)
