"""`cache` and the commands under it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import click

from pipeline.commands.click_options import options_of
from pipeline.commands.output import print_json, print_table, with_progress


@click.group("cache")
def cache_group() -> None:
    """Inspect a cache, check it, and export features from it."""


@cache_group.command("ls")
@click.argument("cache")
@options_of("cache ls")
def cache_ls(cache: str, as_json: bool) -> None:
    """List the files of CACHE and how much of each is done."""
    from pipeline.extraction.inspection import list_files
    from pipeline.reporting.terminal.cache_tables import listing_table

    listing = list_files(cache)
    if as_json:
        print_json(listing)
        return
    print_table(listing_table(listing.files))
    for problem in listing.problems:
        click.echo(f"problem: {problem}", err=True)
    if listing.superseded:
        megabytes = sum(file["bytes"] for file in listing.superseded) / 1e6
        click.echo(f"{len(listing.superseded)} superseded files, {megabytes:.1f} MB; see `thawline cache prune`")


@cache_group.command("show")
@click.argument("cache")
@options_of("cache show")
def cache_show(cache: str, as_json: bool, **selection: Any) -> None:
    """Show everything about one file of CACHE.

    Its layers' specs, runs, classes, unreadable images, and images that it holds twice.
    """
    from pipeline.extraction.inspection import detail
    from pipeline.extraction.object_store import open_catalog
    from pipeline.reporting.terminal.cache_tables import details_view

    details = detail(open_catalog(cache).find(**selection))
    if as_json:
        print_json(details)
        return
    print_table(details_view(details))


@cache_group.command("verify")
@click.argument("cache")
@options_of("cache verify")
def cache_verify(cache: str, source: str | None, repair: bool, cluster: str | None, as_json: bool) -> None:
    """Check the structure and the checksums of CACHE.

    The exit code is 1 if damage is left or an image has changed.
    """
    from pipeline.extraction.inspection import check, to_record
    from pipeline.reporting.terminal.cache_tables import finding_lines, verify_table

    reports, problems = with_progress(check, cache, source, repair, cluster)
    if as_json:
        print_json({"files": [to_record(report) for report in reports], "problems": problems, "repaired": repair})
    else:
        print_table(verify_table(reports))
        for line in [*finding_lines(reports, repair), *(f"unusable: {problem}" for problem in problems)]:
            click.echo(line)
    damaged = any(not report.sound for report in reports) and not repair
    if damaged or problems or any(report.changed for report in reports):
        sys.exit(1)


@cache_group.command("export")
@click.argument("cache")
@click.argument("file", type=click.Path(dir_okay=False))
@options_of("cache export")
def cache_export(cache: str, file: str, layer: str | None, as_json: bool, **selection: Any) -> None:
    """Write one layer of CACHE to FILE.

    FILE gets the finished rows, as .npy (with a .npy.csv beside it), .parquet or .safetensors.
    """
    from features_cache import export_features
    from pipeline.extraction.inspection import only_layer
    from pipeline.extraction.object_store import open_catalog

    cached = open_catalog(cache).find(layer, **selection)
    written = export_features(cached, layer or only_layer(cached), file)
    if as_json:
        print_json({"files": [str(path) for path in written]})
        return
    click.echo("wrote " + " and ".join(map(str, written)))


@cache_group.command("prune")
@click.argument("cache")
@options_of("cache prune")
def cache_prune(cache: str, yes: bool, as_json: bool) -> None:
    """Delete the superseded files of CACHE.

    A newer file has taken the place of each. Rows that only a superseded file holds are lost.
    """
    from features_cache import prune, superseded
    from pipeline.extraction.object_store import local_path, shown

    paths = superseded(local_path(cache, to_write=False))
    names = [shown(path) for path in paths]
    for name, path in zip(names, paths, strict=True):
        click.echo(f"{name}  {path.stat().st_size / 1e6:.1f} MB", err=True)
    where = " from the object store" if names != list(map(str, paths)) else ""
    if not paths or not (yes or _confirmed(f"Delete {_files(paths)}{where}?")):
        deleted, freed = [], 0
    else:
        deleted, freed = names, prune(paths)
    if as_json:
        print_json({"deleted": deleted, "bytes": freed})
        return
    click.echo(f"{_files(deleted)} deleted, {freed / 1e6:.1f} MB freed")


def _files(some: Sequence[object]) -> str:
    return f"{len(some)} file{'s' * (len(some) != 1)}"


def _confirmed(question: str) -> bool:
    try:
        return click.confirm(question, err=True)
    except click.Abort:
        raise click.UsageError("no answer, so nothing was deleted; add --yes to delete without being asked") from None
