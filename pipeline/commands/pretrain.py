"""`pretrain`."""

from __future__ import annotations

from typing import Any

import click

from pipeline.commands.click_options import options_of
from pipeline.commands.output import print_json, print_table, say, say_all, with_progress
from pipeline.errors import resumable
from pipeline.spec import size_name


@click.command()
@click.argument("source")
@options_of("pretrain")
@resumable()
def pretrain(source: str, as_json: bool, **options: Any) -> None:
    """Train a backbone on a nearby task that needs no labels.

    The backbone is saved without the task's own top. A run that was stopped resumes.
    """
    from pipeline.pretrain import pretrain as run
    from pipeline.reporting.terminal.tables import pretrain_table

    report = with_progress(run, source, say=say, **options)
    say_all(report.notes)
    if as_json:
        print_json({"result": report.result, "notes": report.notes, "saved": report.result.path})
        return
    print_table(pretrain_table(report.result))
    size = "" if options["size"] is None else f" --size {size_name(options['size'])}"
    click.echo(f"backbone: -b {report.result.saved_as}{size}")
