"""`demo`."""

from __future__ import annotations

import click

from pipeline.commands.click_options import options_of
from pipeline.commands.output import print_json, print_table, with_progress


@click.command()
@options_of("demo")
def demo(folder: str, as_json: bool) -> None:
    """Find the layer that reads handwritten digits best."""
    from pipeline.demo import demo as run
    from pipeline.reporting.terminal.tables import fit_table

    report = with_progress(run, folder)
    if as_json:
        print_json({"results": report.results, "summary": report.summary, "files": report.files})
        return
    print_table(fit_table(report.results))
    click.echo(f"\n{report.summary}\n")
    for name, path in report.files.items():
        click.echo(f"{name}: {path}")
