"""`extract`, and what it can take: `backbones` and `layers`."""

from __future__ import annotations

from typing import Any

import click

from pipeline.commands.options import AutoCount, device_option, engine_option, json_option, source_argument
from pipeline.commands.output import print_json, print_table, say_all, to_records
from pipeline.errors import resumable
from pipeline.spec import DEFAULT_BACKBONE, DEFAULT_CACHE, DEFAULT_LAYER, DEFAULT_POOL, POOLS, PRECISIONS, STORES


@click.command()
@click.argument("pattern", required=False)
@json_option
def backbones(pattern: str | None, as_json: bool) -> None:
    """List the networks, of a PATTERN such as 'resnet*'."""
    from pipeline.backbones.registry import list_backbones
    from pipeline.reporting.terminal.tables import rows_table

    found = list_backbones(pattern or "")
    if as_json:
        print_json({"backbones": [entry._asdict() for entry in found]})
        return
    rows = [(entry.name, entry.zoo, ", ".join(entry.local), ", ".join(entry.weights)) for entry in found]
    print_table(rows_table(("backbone", "zoo", "on this machine", "all weights"), rows))


@click.command()
@click.argument("backbone")
@click.option("--size", type=int, help="Side of the network input, pixels; the backbone's own by default.")
@json_option
def layers(backbone: str, size: int | None, as_json: bool) -> None:
    """List the layers of BACKBONE with shapes and aliases."""
    from pipeline.backbones.layers import list_layers
    from pipeline.backbones.registry import sketch
    from pipeline.reporting.terminal.tables import rows_table

    found = list_layers(sketch(backbone, size))
    if as_json:
        print_json({"layers": [row._asdict() for row in found]})
        return
    rows = [(row.name, "×".join(map(str, row.shape)), ", ".join(row.aliases)) for row in found]
    print_table(rows_table(("layer", "shape", "aliases"), rows))


@click.command()
@source_argument
@click.option("-b", "--backbone", multiple=True, default=[DEFAULT_BACKBONE], help="NAME or NAME@WEIGHTS; repeat.")
@click.option("-l", "--layer", multiple=True, default=[DEFAULT_LAYER], help="Layer name or alias; repeat.")
@click.option("--pool", type=click.Choice(POOLS), default=DEFAULT_POOL, help="How activations become features.")
@click.option("-o", "--output", default=DEFAULT_CACHE, help="Folder of cache files.")
@click.option("--precision", type=click.Choice(PRECISIONS), default="auto", help="auto: bf16 where there is hardware.")
@click.option("--store", type=click.Choice(STORES), default="float32", help="Number type on disk.")
@click.option("--size", type=int, help="Side of the network input, pixels; the backbone's own by default.")
@click.option("--batch-size", type=AutoCount(), default="auto", help="Images a forward pass; auto fits the machine.")
@click.option("--workers", type=AutoCount(), default="auto", help="Decoding threads; auto is one a core.")
@click.option("--on-error", type=click.Choice(["skip", "stop"]), default="skip", help="When an image is unreadable.")
@click.option("--rehash", is_flag=True, help="Read every file again instead of trusting size and time.")
@engine_option
@device_option
@json_option
@resumable()
def extract(source: str, backbone: tuple[str, ...], layer: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Run frozen networks over SOURCE and cache features.

    SOURCE is a folder of class folders (under train/val/test folders or not), a folder of images, one image, a .csv or
    .parquet manifest, a .tar shard or a folder of them, or the word digits.
    """
    from pipeline.extract import extract as run
    from pipeline.reporting.terminal.progress import progress_bar
    from pipeline.reporting.terminal.tables import extract_table, unreadable_lines

    with progress_bar() as progress:
        results = run(source, backbone, layer, progress=progress, **options)
    say_all(note for result in results for note in result.notes)
    for line in unreadable_lines(results):
        click.echo(line, err=True)
    if as_json:
        print_json({"caches": to_records(results)})
        return
    print_table(extract_table(results))
