"""`units`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pipeline.commands.click_options import options_of
from pipeline.commands.output import print_json, print_table, say_all, with_progress


@click.command()
@click.argument("cache")
@options_of("units")
def units(cache: str, page: Path, as_json: bool, **options: Any) -> None:
    """Show what units of CACHE see.

    The images that excite the most selective channels of some layers most, cropped to where these look. CACHE must hold
    the layers with --pool max.
    """
    from pipeline.model_file import check_destination
    from pipeline.reporting.page.units import write_units
    from pipeline.reporting.terminal.tables import units_table
    from pipeline.units import units as run

    check_destination(page, ".html")
    report = with_progress(run, cache, **options)
    say_all(report.notes)
    write_units(page, report)
    if as_json:
        print_json({"units": report.units, "layers": report.layers, "notes": report.notes, "page": str(page)})
        return
    print_table(units_table(report.units))
    for name, counts in report.layers.items():
        selective = "" if counts["selective"] is None else f", {counts['selective']} selective (p <= 0.05)"
        click.echo(f"{name}: {counts['channels']} channels{selective}")
    click.echo(f"page: {page}")
