"""`duplicates`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pipeline.commands.click_options import options_of
from pipeline.commands.output import print_json, print_table, say_all, with_progress


@click.command()
@click.argument("cache")
@click.argument("second", required=False, metavar="[CACHE2]")
@options_of("duplicates")
def duplicates(
    cache: str, second: str | None, csv: Path | None, page: Path | None, as_json: bool, **options: Any
) -> None:
    """Find near-duplicates in CACHE, or the images of CACHE2 that are in CACHE.

    They are resized, recompressed, cropped, mirrored or toned copies. What counts as near is measured on the images.
    """
    from pipeline.duplicates import duplicates as run
    from pipeline.duplicates import write_duplicates
    from pipeline.reporting.page.gallery import duplicates_page
    from pipeline.reporting.terminal.neighbour_tables import copies_table, groups_table, threshold_lines

    report = with_progress(run, cache, second, **options)
    say_all(report.notes)
    if csv:
        write_duplicates(report, csv)
    if page:
        say_all(duplicates_page(report, page))
    if as_json:
        document = {"near": report.near, "images": report.images, "groups": report.groups}
        print_json(document | ({"copies": report.copies} if second else {}))
        return
    for line in threshold_lines(report.near):
        click.echo(line)
    if second:
        click.echo(f"{len(report.copies)} images of the second cache are in the first")
    else:
        grouped = sum(map(len, report.groups))
        click.echo(f"{grouped} images in {len(report.groups)} groups of near-duplicates")
    if report.copies or report.groups:
        print_table(copies_table(report.copies) if second else groups_table(report.groups))
