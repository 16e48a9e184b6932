"""`rank` and `drift`."""

from __future__ import annotations

from typing import Any

import click

from pipeline.commands.options import cache_argument, json_option
from pipeline.commands.output import print_json, print_table, say_all, to_records
from pipeline.spec import DEFAULT_LAYER, POOLS


@click.command()
@cache_argument
@click.option("--source", help="Which source, where the cache holds several.")
@click.option("-b", "--backbone", help="Only this backbone.")
@click.option("--pool", type=click.Choice(POOLS), help="Only this pooling.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Seed of the split.")
@click.option("--fit", "fitted", is_flag=True, help="Fit logistic regression, too, and compare the orders.")
@json_option
def rank(cache: str, as_json: bool, **options: Any) -> None:
    """Order the layers in CACHE by promise, before any fit."""
    from pipeline.rank import rank as run
    from pipeline.reporting.terminal.diagnostic_tables import agreement_lines, rank_table
    from pipeline.reporting.terminal.progress import progress_bar

    with progress_bar() as progress:
        report = run(cache, progress=progress, **options)
    say_all(report.notes)
    if as_json:
        print_json({"ranking": to_records(report.ranking), "agreement": to_records(report.agreement)})
        return
    print_table(rank_table(report.ranking))
    for line in agreement_lines(report.agreement):
        click.echo(line)


@click.command()
@click.argument("first")
@click.argument("second")
@click.option("-l", "--layer", default=DEFAULT_LAYER, help="A layer that both caches hold.")
@click.option("-b", "--backbone", help="Which backbone, where a cache holds several.")
@click.option("--pool", type=click.Choice(POOLS), help="Which pooling, where a cache holds several.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Seed of draws, folds and permutations.")
@json_option
def drift(as_json: bool, **options: Any) -> None:
    """Test whether two caches are of one domain.

    Also names the most foreign images of FIRST and SECOND.
    """
    from pipeline.drift import drift as run
    from pipeline.reporting.terminal.diagnostic_tables import drift_lines, foreign_table
    from pipeline.results import to_json

    result = run(**options)
    if as_json:
        print_json(to_json(result))
        return
    for line in drift_lines(result):
        click.echo(line)
    print_table(foreign_table(result))
