"""`lecture`."""

from __future__ import annotations

import click

from pipeline.commands.click_options import options_of
from pipeline.commands.output import print_json, print_table, say, say_all, with_progress
from pipeline.errors import resumable


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@options_of("lecture")
@resumable()
def lecture(names: tuple[str, ...], source: str, output: str, quick: bool, as_json: bool) -> None:
    """Measure the claims NAME... of a lecture on transfer learning, or `all`; without a name, list them.

    The page in the output folder has all claims that were measured in that folder, beside the published values.
    """
    from pipeline.lecture import CLAIMS
    from pipeline.lecture import lecture as run
    from pipeline.reporting.terminal.tables import lecture_table, rows_table

    if not names:
        if as_json:
            print_json({"claims": [{"claim": name, "statement": statement} for name, statement in CLAIMS.items()]})
        else:
            print_table(rows_table(("claim", "what it says"), CLAIMS.items()))
        return
    report = with_progress(run, names, source, output, quick=quick)
    if as_json:
        print_json({"results": report.results, "files": report.files})
        return
    if quick:
        say("these are short forms, which show that the claims run, and are too small to judge them")
    for result in report.results:
        print_table(lecture_table(result))
        say_all(result.notes)
    for name, path in report.files.items():
        click.echo(f"{name}: {path}")
