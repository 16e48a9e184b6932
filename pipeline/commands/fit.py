"""`fit`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.commands.click_options import ValueMayFollow, options_of
from pipeline.commands.output import print_json, print_table, say, say_all, with_progress

if TYPE_CHECKING:
    from pipeline.fit import FitReport
    from pipeline.results import HeadResult


@click.command(cls=ValueMayFollow)
@click.argument("cache")
@options_of("fit")
def fit(cache: str, plot: Path | None, as_json: bool, **options: Any) -> None:
    """Train heads on CACHE and measure them on test images."""
    from pipeline.fit import fit as run
    from pipeline.reporting.terminal.neighbour_tables import nearness_table, price_lines
    from pipeline.reporting.terminal.tables import fit_table, gains_table, labels_table, seeds_table
    from pipeline.results import FitResult, MultilabelResult

    if plot:
        plot.mkdir(parents=True, exist_ok=True)  # before the work that would be lost
    report = with_progress(run, cache, **options)
    say_all(report.notes)
    drawn = _draw(report, plot) if plot else []
    if as_json:
        document = {
            "results": report.results,
            "summary": report.summary,
            "notes": report.notes,
            "best": report.best,
            "saved": str(report.saved) if report.saved else None,
            "gains": report.gains,
        }
        print_json(document | {"plots": drawn} if plot else document)
        return
    print_table(fit_table(report.results))
    best = report.results[report.best]
    if isinstance(best, MultilabelResult):
        click.echo()
        print_table(labels_table(best))
    if isinstance(best, FitResult) and (price := best.leak_price):
        click.echo()
        print_table(nearness_table(price))
        for line in price_lines(price):
            click.echo(line)
    if report.summary:
        click.echo()
        print_table(seeds_table(report.summary))
    if report.gains:
        click.echo()
        print_table(gains_table(report.gains))
    if report.saved:
        click.echo(f"model: {report.saved} ({_described(best)})")
    for path in drawn:
        click.echo(f"picture: {path}")


def _described(result: HeadResult) -> str:
    from pipeline.evaluation.wording import metric_text

    name = "" if result.metric == "accuracy" else f" {result.metric}"
    validated = "not validated"
    if result.validated is not None:
        validated = f"validation{name} {metric_text(result.metric, result.validation_score)}"
    return f"{result.head} on {result.layer}, shots {result.shots}, seed {result.seed}, {validated}"


def _draw(report: FitReport, folder: Path) -> list[str]:
    from pipeline.reporting.charts.fit_pictures import draw_fit
    from pipeline.reporting.charts.theme import characters_without_font

    if lacking := characters_without_font(report.classes):
        say(
            f"no installed font has {lacking[:20]}, so the .png pictures show boxes for them; install one, such as "
            "Noto Sans CJK for Chinese and Japanese, or use the .svg pictures"
        )
    drawn = draw_fit(report, folder)
    if not drawn:
        say("nothing is drawn: each label is on all test images, or on none")
    return [str(path) for path in drawn]
