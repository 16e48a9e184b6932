"""What commands print: one JSON document or tables on stdout, notes on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

UNFOLDED = 10_000
"""Letters in a line of a file or a pipe: a path stays whole."""


def say(sentence: str) -> None:
    """Print a note while the work goes on."""
    click.echo(f"note: {sentence}", err=True)


def say_all(notes: Iterable[str]) -> None:
    """Print notes, each once."""
    for note in dict.fromkeys(notes):
        say(note)


def to_records(records: list[Any]) -> list[dict[str, Any]]:
    """Return records as JSON objects."""
    from pipeline.results import to_json

    return [to_json(record) for record in records]


def print_json(document: dict[str, Any]) -> None:
    """Print the one JSON document."""
    click.echo(json.dumps(document, ensure_ascii=False, allow_nan=False))


def print_table(table: Table | Group) -> None:
    """Print a table as wide as the terminal allows, unfolded where nobody looks, and its title on a line of its own."""
    from rich.console import Console
    from rich.table import Table

    from pipeline.reporting.terminal.layout import lay_out

    width = None if sys.stdout.isatty() else UNFOLDED
    console = Console(width=width, markup=False, highlight=False)  # file names may look like markup
    if isinstance(table, Table) and table.title:
        console.print(table.title, style="italic")
        table.title = None
    console.print(lay_out(table, console.width))
