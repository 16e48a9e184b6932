"""`backbones` and `layers`: what `extract` and `finetune` can be given."""

from __future__ import annotations

import click

from pipeline.commands.click_options import options_of
from pipeline.commands.output import print_json, print_table
from pipeline.spec import Size


@click.command()
@click.argument("pattern", default="")
@options_of("backbones")
def backbones(pattern: str, as_json: bool) -> None:
    """List all networks, or those that match PATTERN.

    PATTERN is a name with wildcards, such as 'resnet*'.
    """
    from pipeline.backbones.registry import list_backbones
    from pipeline.reporting.terminal.tables import rows_table

    found = list_backbones(pattern)
    if as_json:
        print_json({"backbones": [entry._asdict() for entry in found]})
        return
    rows = [(entry.name, entry.zoo, ", ".join(entry.local), ", ".join(entry.weights)) for entry in found]
    print_table(rows_table(("backbone", "zoo", "on this machine", "all weights"), rows))


@click.command()
@click.argument("backbone")
@options_of("layers")
def layers(backbone: str, size: Size | None, as_json: bool) -> None:
    """List the layers of BACKBONE with shapes and aliases."""
    from pipeline.backbones.aliases import classifier_reads
    from pipeline.backbones.layers import list_layers
    from pipeline.backbones.registry import sketch
    from pipeline.reporting.terminal.tables import rows_table

    network = sketch(backbone, size)
    found, reads = list_layers(network), classifier_reads(network.traced)
    if as_json:
        print_json({"layers": [row._asdict() for row in found], "penultimate": reads})
        return
    rows = [(row.name, "×".join(map(str, row.shape)), ", ".join(row.aliases)) for row in found]
    print_table(rows_table(("layer", "shape", "aliases"), rows))
    if reads:
        click.echo(f"penultimate is {reads}")
