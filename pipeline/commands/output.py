"""What commands print: one JSON document or tables on stdout; notes and progress on stderr."""

from __future__ import annotations

import codecs
import io
import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import click

from pipeline.user_folder import user_folder

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

Report = TypeVar("Report")
UNFOLDED = 10_000
"""Width of a line, in characters, when stdout is a file or a pipe: paths stay whole."""

_PLAIN = str.maketrans({"→": "->", "–": "-", "−": "-", "×": "x", "…": "..."})
"""Characters in our own texts that some encodings lack, and what stands for them there."""


def bear_any_encoding() -> None:
    r"""Let stdout and stderr take any text: what their encoding lacks is printed as ``->`` or ``\u732b``."""

    def replace(error: UnicodeError) -> tuple[str, int]:
        if not isinstance(error, UnicodeEncodeError):
            raise error
        text = error.object[error.start : error.end].translate(_PLAIN)
        return text.encode("ascii", "backslashreplace").decode(), error.end

    codecs.register_error("thawline", replace)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="thawline")


def keep_matplotlibs_cache() -> None:
    """Let matplotlib list the fonts in our own cache folder, unless the user names another or there is no home."""
    with suppress(RuntimeError):
        os.environ.setdefault("MPLCONFIGDIR", str(user_folder("matplotlib")))


@contextmanager
def counted_warnings() -> Iterator[None]:
    """Print the warnings of each library as one note, with their number, when the command is over."""
    first: dict[str, str] = {}
    counts: Counter[str] = Counter()

    def count(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        _, installed, path = filename.rpartition("site-packages" + os.sep)
        library = path.partition(os.sep)[0] if installed else Path(filename).name
        first.setdefault(library, " ".join(str(message).split()))
        counts[library] += 1

    before, warnings.showwarning = warnings.showwarning, count
    try:
        yield
    finally:
        warnings.showwarning = before
        for library, number in counts.items():
            say(f"{number} warning{'s' * (number > 1)} of {library}, first: {first[library]}")


def with_progress(stage: Callable[..., Report], *args: Any, **options: Any) -> Report:
    """Call a stage with a progress bar, and return what it returns."""
    from pipeline.reporting.terminal.progress import progress_bar

    with progress_bar() as progress:
        return stage(*args, progress=progress, **options)


def say(sentence: str) -> None:
    """Print a note while the work goes on."""
    click.echo(f"note: {sentence}", err=True)


def say_all(notes: Iterable[str]) -> None:
    """Print notes, each once."""
    for note in dict.fromkeys(notes):
        say(note)


def print_json(document: Any) -> None:
    """Print the one JSON document, in ASCII: a record, or a dictionary that holds records."""
    click.echo(json.dumps(document, allow_nan=False, default=_record))


def print_table(table: Table | Group) -> None:
    """Print a table as wide as the terminal, or unfolded into a file or a pipe; its title stands on a line above it."""
    from rich.console import Console
    from rich.table import Table

    from pipeline.reporting.terminal.layout import lay_out

    width = None if sys.stdout.isatty() else UNFOLDED
    console = Console(width=width, markup=False, highlight=False)  # file names may look like markup
    if isinstance(table, Table) and table.title:
        console.print(table.title, style="italic")
        table.title = None
    console.print(lay_out(table, console.width))


def _record(value: Any) -> dict[str, Any]:
    from pipeline.results import to_json

    return to_json(value)
