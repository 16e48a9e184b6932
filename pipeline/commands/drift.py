"""`drift`."""

from __future__ import annotations

from typing import Any

import click

from pipeline.commands.click_options import options_of
from pipeline.commands.output import print_json, print_table, say_all


@click.command()
@click.argument("first")
@click.argument("second")
@options_of("drift")
def drift(first: str, second: str, as_json: bool, **options: Any) -> None:
    """Test whether two caches are of one domain.

    Also names the images of FIRST and SECOND that look most foreign to the other.
    """
    from pipeline.drift import drift as run
    from pipeline.reporting.terminal.tables import drift_lines, foreign_table

    result = run(first, second, **options)
    if as_json:
        print_json(result)
        return
    say_all(result.notes)
    for line in drift_lines(result):
        click.echo(line)
    print_table(foreign_table(result))
