"""`rank`."""

from __future__ import annotations

from typing import Any

import click

from pipeline.commands.click_options import options_of
from pipeline.commands.output import print_json, print_table, say_all, with_progress


@click.command()
@click.argument("cache")
@options_of("rank")
def rank(cache: str, as_json: bool, **options: Any) -> None:
    """Order the layers in CACHE before any fit.

    The first is the one that promises to tell the target best.
    """
    from pipeline.rank import rank as run
    from pipeline.reporting.terminal.tables import agreement_lines, rank_table

    report = with_progress(run, cache, **options)
    say_all(report.notes)
    if as_json:
        print_json({"ranking": report.ranking, "agreement": report.agreement})
        return
    print_table(rank_table(report.ranking))
    for line in agreement_lines(report.agreement, report.ranking[0].metric):
        click.echo(line)
