"""`predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pipeline.commands.click_options import options_of
from pipeline.commands.output import print_json, print_table, say_all, with_progress


@click.command()
@click.argument("model")
@click.argument("source")
@options_of("predict")
def predict(model: str, source: str, csv: Path | None, as_json: bool, **options: Any) -> None:
    """Label the images of SOURCE with a saved MODEL."""
    from pipeline.model_file import check_destination
    from pipeline.predict import predict as run
    from pipeline.predict import write_csv
    from pipeline.reporting.terminal.tables import count_table, prediction_table

    if csv:
        check_destination(csv, ".csv")
    report = with_progress(run, model, source, **options)
    say_all(report.notes)
    if csv:
        write_csv(report.predictions, csv)
    if as_json:
        print_json({"predictions": report.predictions, "target": report.target})
        return
    target = report.target or "label"
    print_table(prediction_table(report.predictions, target))
    if len(report.predictions) > 1 and not any(one.value is not None for one in report.predictions):
        print_table(count_table(report.predictions, target))
