"""A progress bar on stderr for whatever stage runs."""

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

WIDE = 120
"""Letters of a terminal from which on the bar may be long: elsewhere what is done counts more."""


class _Rate(ProgressColumn):
    """How many a second, once that is known."""

    def render(self, task: Task) -> Text:
        """Return the rate, but not of the first second, whose batches come all at once."""
        known = task.speed and (task.finished_time or task.elapsed or 0) > 1
        return Text(f"{task.speed:.0f}/s" if known else "")


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Yield a function that draws one bar for each different `text`; the next one takes the place of full ones.

    Nothing is drawn where stderr is not a terminal, so logs stay readable.
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
                for task in drawing.tasks:  # full bars make room: only what fits on the screen is drawn
                    drawing.update(task.id, visible=not task.finished)
                bars[text] = drawing.add_task(text, total=total, state="")
            drawing.update(bars[text], completed=done, total=total, state=state)

        yield report
