"""`extract`."""

from __future__ import annotations

from typing import Any

import click

from pipeline.commands.click_options import options_of
from pipeline.commands.output import print_json, print_table, say_all, with_progress
from pipeline.errors import resumable


@click.command()
@click.argument("source")
@options_of("extract")
@resumable()
def extract(source: str, as_json: bool, **options: Any) -> None:
    """Run frozen networks over SOURCE and cache features.

    SOURCE is a folder of class folders (with or without train/val/test above them), a folder of images, one image, a
    manifest (.csv, .tsv, .jsonl, .parquet), a file with images inside (.tar, .tar.gz, .zip, .parquet, .arrow) or a
    folder of them, a URL of any of these (s3://, gs://, az://, https://), or the word digits.
    """
    from features_cache import open_cache
    from pipeline.evaluation.rows import check_readable
    from pipeline.extract import extract as run
    from pipeline.reporting.terminal.tables import extract_table, unreadable_lines

    results = with_progress(run, source, **options)
    say_all(note for result in results for note in result.notes)
    for result in results:
        check_readable(open_cache(result.path))
    for line in unreadable_lines(results):
        click.echo(line, err=True)
    if as_json:
        print_json({"caches": results})
        return
    print_table(extract_table(results))
