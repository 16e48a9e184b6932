"""`fit`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.commands.options import as_shots, json_option
from pipeline.commands.output import print_json, print_table, say_all, to_records
from pipeline.spec import POOLS

if TYPE_CHECKING:
    from pipeline.fit import FitReport
    from pipeline.results import FitResult


@click.command()
@click.argument("cache")
@click.option("-l", "--layer", multiple=True, help="Layer, or A+B joined; repeat. Every cached layer by default.")
@click.option("--head", multiple=True, default=["logreg"], help="Such as logreg, linear_svm, rbf_svm/l2; repeat.")
@click.option("--shots", multiple=True, default=["all"], help="Training images per class, or all; repeat.")
@click.option("--seed", multiple=True, type=int, default=[0], help="Seed of the split and of the shots; repeat.")
@click.option("--source", help="Which source, where the cache holds several.")
@click.option("-b", "--backbone", help="Which backbone, where the cache holds several.")
@click.option("--pool", type=click.Choice(POOLS), help="Which pooling, where the cache holds several.")
@click.option("--cv", type=click.IntRange(min=2), help="Cross-validate with so many folds; every image is test once.")
@click.option("--balanced", is_flag=True, help="Let every class count alike, whatever its size.")
@click.option("--drop-leaks", is_flag=True, help="Take test images out that are byte-equal to training images.")
@click.option("--save", type=click.Path(dir_okay=False), help="Keep the best model (most shots, then validation).")
@click.option("--plot", type=click.Path(file_okay=False, path_type=Path), help="Draw the results into this folder.")
@click.option("--jobs", type=click.IntRange(min=1), help="Fits at a time; one a core by default.")
@click.option("--device", default="auto", help="For logreg: cpu (which auto is), cuda or cuda:N.")
@json_option
def fit(
    cache: str, layer: tuple[str, ...], head: tuple[str, ...], shots: tuple[str, ...], seed: tuple[int, ...],
    plot: Path | None, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Train heads on CACHE and measure them on test images."""
    from pipeline.fit import fit as run
    from pipeline.reporting.terminal.progress import progress_bar
    from pipeline.reporting.terminal.tables import fit_table, seeds_table

    if plot:
        plot.mkdir(parents=True, exist_ok=True)  # before the work that would be lost
    with progress_bar() as progress:
        report = run(cache, list(layer) or None, head, seed, as_shots(shots), progress=progress, **options)
    say_all(report.notes)
    drawn = _draw_fit(report, plot, cache, options) if plot else []
    if as_json:
        document = {
            "results": to_records(report.results),
            "summary": to_records(report.summary),
            "notes": report.notes,
            "best": report.best,
            "saved": str(report.saved) if report.saved else None,
        }
        print_json(document | {"plots": drawn} if plot else document)
        return
    print_table(fit_table(report.results))
    if report.summary:
        click.echo()
        print_table(seeds_table(report.summary))
    if report.saved:
        click.echo(f"model: {report.saved} ({_described(report.results[report.best])})")
    for path in drawn:
        click.echo(f"picture: {path}")


def _described(result: FitResult) -> str:
    chosen = result.validation_accuracy
    validated = "not validated" if chosen is None else f"validation {chosen:.3f}"
    return f"{result.head} on {result.layer}, shots {result.shots}, seed {result.seed}, {validated}"


def _draw_fit(report: FitReport, folder: Path, cache: str, options: dict[str, Any]) -> list[str]:
    from features_cache import Catalog
    from pipeline.evaluation.rows import select
    from pipeline.reporting.charts.fit_pictures import draw_fit

    narrowed = (options["source"], options["backbone"], options["pool"])
    layer = select(Catalog(cache), [report.results[report.best].layer], *narrowed)[0]
    return [str(path) for path in draw_fit(report, layer, folder)]
