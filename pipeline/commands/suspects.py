"""`suspects`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pipeline.commands.click_options import options_of
from pipeline.commands.output import print_json, print_table, say_all, with_progress


@click.command()
@click.argument("cache")
@options_of("suspects")
def suspects(
    cache: str,
    labels_out: Path | None,
    corrections: Path | None,
    page: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Find labels of CACHE that are probably wrong.

    Labels are also changed on purpose, to see how many of such the list finds.
    """
    from pipeline.reporting.page.gallery import suspects_page
    from pipeline.reporting.terminal.neighbour_tables import conflicts_table, planted_lines, suspects_table
    from pipeline.suspects import read_corrections, write_labels
    from pipeline.suspects import suspects as run

    if corrections and not labels_out:
        raise click.UsageError("--corrections says what to change in the table of --labels-out; give both")
    corrected = read_corrections(corrections) if corrections else None
    report = with_progress(run, cache, **options)
    say_all(report.notes)
    if labels_out:
        changed = write_labels(report, labels_out, corrected)
        click.echo(f"note: {changed} labels in {labels_out} differ from those of the cache", err=True)
    if page:
        say_all(suspects_page(report, page))
    if as_json:
        names = ("layer", "head", "accuracy", "conflicts", "suspects", "planted")
        print_json({name: getattr(report, name) for name in names})
        return
    if report.conflicts:
        print_table(conflicts_table(report.conflicts))
        click.echo()
    count = len(report.table.labels)
    click.echo(
        f"{len(report.suspects)} of {count} labels are in doubt, by {report.head} on {report.layer}, "
        f"whose accuracy on images it has not seen is {report.accuracy:.3f}"
    )
    if report.suspects:
        print_table(suspects_table(report.suspects))
    for line in planted_lines(report.planted):
        click.echo(line)
