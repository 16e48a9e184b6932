"""`export`."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.commands.click_options import options_of
from pipeline.commands.output import print_json


@click.command()
@click.argument("model")
@options_of("export")
def export(model: str, path: Path, as_json: bool) -> None:
    """Write MODEL as one ONNX graph, from pixels to labels."""
    from pipeline.export import export as run

    result = run(model, path)
    if as_json:
        print_json(result)
        return
    click.echo(f"{result.path}: {result.backbone}, {result.layer}, {result.head}, {result.bytes / 1e6:.1f} MB")
    for name, shape in result.inputs.items():
        click.echo(f"takes {name}: uint8 ({', '.join('n' if axis is None else str(axis) for axis in shape)})")
    click.echo(f"gives {', '.join(result.outputs)} for {result.classes} classes")
