"""Progress bars on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.text import Text

from pipeline.results import Progress

WIDE = 120  # in a terminal of at least so many characters, bars are long; a narrower one needs the room for numbers


class _Rate(ProgressColumn):
    """Items per second, once that is known."""

    def render(self, task: Task) -> Text:
        """Return the rate, but none in the first second, when batches come all at once."""
        known = task.speed and (task.finished_time or task.elapsed or 0) > 1
        return Text(f"{task.speed:.0f}/s" if known else "")


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Yield a function that draws one bar for each different `text`; a new bar replaces those that are full.

    Nothing is drawn if stderr is not a terminal, so that logs stay readable.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(40 if console.width >= WIDE else 10),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[state]}"),
    )
    bars: dict[str, TaskID] = {}
    with Bars(*columns, console=console, disable=not console.is_terminal) as drawing:

        def report(done: int, total: int, text: str, state: str = "") -> None:
            if text not in bars:
                for task in drawing.tasks:  # rich draws only what fits on the screen
                    drawing.update(task.id, visible=not task.finished)
                bars[text] = drawing.add_task(text, total=total, state="")
            drawing.update(bars[text], completed=done, total=total, state=state)

        yield report
