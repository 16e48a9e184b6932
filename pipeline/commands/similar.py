"""`similar`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pipeline.commands.click_options import options_of
from pipeline.commands.output import print_json, print_table, say_all, with_progress


@click.command()
@click.argument("cache")
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@options_of("similar")
def similar(
    cache: str, images: tuple[str, ...], csv: Path | None, page: Path | None, as_json: bool, **options: Any
) -> None:
    """Find the images of CACHE that look most like each IMAGE.

    IMAGE is the name of an image in CACHE, or an image, a folder or another source.
    """
    from pipeline.reporting.page.gallery import similar_page
    from pipeline.reporting.terminal.neighbour_tables import similar_table
    from pipeline.similar import similar as run
    from pipeline.similar import write_similar

    report = with_progress(run, cache, images, **options)
    say_all(report.notes)
    if csv:
        write_similar(report.found, csv)
    if page:
        say_all(similar_page(report, page))
    if as_json:
        print_json({"layer": report.layer, "images": report.rows, "recall": report.recall, "similar": report.found})
        return
    print_table(similar_table(report.found, report.layer))
