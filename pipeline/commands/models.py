"""What uses a saved model: `predict` and `export`."""

from __future__ import annotations

from typing import Any

import click

from pipeline.commands.options import device_option, engine_option, json_option, source_argument
from pipeline.commands.output import print_json, print_table, say_all, to_records


@click.command()
@click.argument("model")
@source_argument
@click.option("--csv", "csv_path", type=click.Path(dir_okay=False), help="Write the predictions to FILE.")
@click.option("-o", "--output", help="Folder of cache files to go through, so that a long run can go on after a stop.")
@engine_option
@device_option
@json_option
def predict(model: str, source: str, csv_path: str | None, as_json: bool, **options: Any) -> None:
    """Label the images of SOURCE with a saved MODEL."""
    from pipeline.model_file import check_destination
    from pipeline.predict import predict as run
    from pipeline.predict import write_csv
    from pipeline.reporting.terminal.progress import progress_bar
    from pipeline.reporting.terminal.tables import count_table, prediction_table

    destination = check_destination(csv_path) if csv_path else None
    with progress_bar() as progress:
        report = run(model, source, progress=progress, **options)
    say_all(report.notes)
    if destination:
        write_csv(report.predictions, destination)
    if as_json:
        print_json({"predictions": to_records(report.predictions)})
        return
    print_table(prediction_table(report.predictions))
    if len(report.predictions) > 1:
        print_table(count_table(report.predictions))


@click.command()
@click.argument("model")
@click.option("--onnx", "path", required=True, type=click.Path(dir_okay=False), help="The file to write.")
@json_option
def export(model: str, path: str, as_json: bool) -> None:
    """Write MODEL as one ONNX graph, pixels in, labels out."""
    from pipeline.export import export as run
    from pipeline.results import to_json

    result = run(model, path)
    if as_json:
        print_json(to_json(result))
        return
    click.echo(f"{result.path}: {result.backbone}, {result.layer}, {result.head}, {result.bytes / 1e6:.1f} MB")
    for name, shape in result.inputs.items():
        click.echo(f"takes {name}: uint8 ({', '.join('n' if axis is None else str(axis) for axis in shape)})")
    click.echo(f"gives {', '.join(result.outputs)} for {result.classes} classes")
