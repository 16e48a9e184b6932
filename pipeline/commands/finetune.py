"""`finetune`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.commands.click_options import options_of
from pipeline.commands.output import print_json, print_table, say, say_all, with_progress
from pipeline.errors import resumable

if TYPE_CHECKING:
    from pipeline.results import TunedResult


@click.command()
@click.argument("source")
@options_of("finetune")
@resumable()
def finetune(source: str, picture: Path | None, as_json: bool, **options: Any) -> None:
    """Train a network above its thaw line.

    SOURCE is split as fit splits it. The trunk (the frozen layers) runs once and its activations are cached; with
    --augment, only if --views is given. A run that was stopped resumes.
    """
    from pipeline.evaluation.wording import metric_text
    from pipeline.finetune import finetune as run
    from pipeline.model_file import check_destination
    from pipeline.reporting.terminal.tables import finetune_table, labels_table
    from pipeline.results import MultilabelResult

    if picture:
        check_destination(picture, ".png")
    report = with_progress(run, source, say=say, **options)
    say_all(report.notes)
    if as_json:
        saved = str(report.saved) if report.saved else None
        print_json({"results": report.results, "notes": report.notes, "best": report.best, "saved": saved})
    else:
        print_table(finetune_table(report.results))
        best = report.results[report.best]
        if isinstance(best, MultilabelResult):
            click.echo()
            print_table(labels_table(best))
        if report.saved:
            validated = (
                ""
                if best.validated is None
                else f", validation {best.metric} {metric_text(best.metric, best.validation_score)}"
            )
            click.echo(f"model: {report.saved} (seed {best.seed}, shots {best.shots}{validated})")
    if picture:
        _draw(report.results, picture, gradients=options["watch"] is not None)


def _draw(results: Sequence[TunedResult], picture: Path, *, gradients: bool) -> None:
    from pipeline.reporting.charts.finetune_pictures import save_gradients, save_training

    save_training(results, picture)
    if gradients:
        save_gradients(results, picture.with_stem(f"{picture.stem}-gradients"))
