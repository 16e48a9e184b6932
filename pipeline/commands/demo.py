"""`demo`."""

from __future__ import annotations

import click

from pipeline.commands.options import json_option
from pipeline.commands.output import print_json, print_table, to_records


@click.command()
@click.option("-o", "--output", default="thawline-demo", help="Folder for the cache, the model and the picture.")
@json_option
def demo(output: str, as_json: bool) -> None:
    """Find the layer that reads handwritten digits best."""
    from pipeline.demo import demo as run
    from pipeline.reporting.terminal.progress import progress_bar
    from pipeline.reporting.terminal.tables import fit_table

    with progress_bar() as progress:
        report = run(output, progress=progress)
    if as_json:
        print_json({"results": to_records(report.results), "summary": report.summary, "files": report.files})
        return
    print_table(fit_table(report.results))
    click.echo(f"\n{report.summary}\n")
    for name, path in report.files.items():
        click.echo(f"{name}: {path}")
