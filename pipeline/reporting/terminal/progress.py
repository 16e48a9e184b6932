"""Progress bars on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import rich.progress
from rich.console import Console
from rich.text import Text

from pipeline.results import Progress

WIDE = 120  # in a terminal of at least so many characters, bars are long; a narrower one needs the room for numbers


class _Rate(rich.progress.ProgressColumn):
    """Items per second, once that is known."""

    def render(self, task: rich.progress.Task) -> Text:
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
        rich.progress.TextColumn("{task.description}", markup=False),
        rich.progress.BarColumn(40 if console.width >= WIDE else 10),
        rich.progress.MofNCompleteColumn(),
        _Rate(),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("{task.fields[state]}"),
    )
    bars: dict[str, rich.progress.TaskID] = {}
    with rich.progress.Progress(*columns, console=console, disable=not console.is_terminal) as drawing:

        def report(done: int, total: int, text: str, state: str = "") -> None:
            if text not in bars:
                for task in drawing.tasks:  # rich draws only what fits on the screen
                    drawing.update(task.id, visible=not task.finished)
                bars[text] = drawing.add_task(text, total=total, state="")
            drawing.update(bars[text], completed=done, total=total, state=state)

        yield report
