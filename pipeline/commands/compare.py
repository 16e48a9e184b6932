"""`compare`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from pipeline.commands.click_options import options_of
from pipeline.commands.output import print_json, print_table, with_progress
from pipeline.errors import resumable


@click.command()
@click.argument("plan", type=click.Path(dir_okay=False))
@options_of("compare")
@resumable()
def compare(plan: str, output: str, dry_run: bool, against: Path | None, as_json: bool) -> None:
    """Run PLAN, a benchmark in TOML, and write a report.

    Each result is kept: the same command again does only what is missing or changed.
    """
    if dry_run:
        _print_jobs(plan, output, as_json)
        return
    from pipeline.compare import compare as run
    from pipeline.reporting.terminal.compare_tables import against_lines, score_table

    report = with_progress(run, plan, output, against=against)
    if as_json:
        print_json(vars(report) | {"results": [result.to_json() for result in report.results]})
    else:
        if report.results:
            print_table(score_table(report.results, report.best_sets))
            click.echo("\n" + "\n".join(report.answer))
        click.echo(f"\n{report.computed} results are new, {report.reused} were there; {report.seconds:.1f} s")
        for line in against_lines(report.against):
            click.echo(line)
        for name, path in report.files.items() if report.results else ():
            click.echo(f"{name}: {path}")
    for failure in report.failures:
        click.echo(f"failed: {failure.job}: {failure.reason}", err=True)
    if report.failures:
        sys.exit(1)


def _print_jobs(plan: str, output: str, as_json: bool) -> None:
    from pipeline.compare import dry_run
    from pipeline.reporting.terminal.compare_tables import plan_line, plan_tables, power_line

    planned = dry_run(plan, output)
    if as_json:
        print_json(planned)
        return
    for table in plan_tables(planned.jobs):
        print_table(table)
    click.echo(plan_line(planned.jobs))
    for power in planned.power:
        click.echo(power_line(power))
