"""Arguments and options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from pipeline.spec import ENGINES, POOLS

Command = TypeVar("Command", bound=Callable[..., None])
source_argument = click.argument("source")
cache_argument = click.argument("cache")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
engine_option = click.option("--engine", type=click.Choice(ENGINES), default="auto", help="What computes.")
device_option = click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")


class AutoCount(click.IntRange):
    """A positive whole number, or ``auto``, which the stage knows as ``None``."""

    def __init__(self) -> None:
        super().__init__(min=1)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number, or ``None``."""
        return None if value == "auto" else super().convert(value, param, ctx)


def selecting_options(command: Command) -> Command:
    """Add the options that pick one file, and one layer, of a cache."""
    for option in (
        click.option("--pool", type=click.Choice(POOLS), help="Which pooling, where the cache holds several."),
        click.option("-l", "--layer", help="Which layer, where the cache holds several."),
        click.option("-b", "--backbone", help="Which backbone, where the cache holds several."),
        click.option("--source", help="Which source, by name or location, where the cache holds several."),
    ):
        command = option(command)
    return command


def as_shots(values: tuple[str, ...]) -> list[int | str]:
    """Return what was given to ``--shots`` as numbers, or ``all``."""
    for value in values:
        if value != "all" and not (value.isdigit() and int(value) > 0):
            raise click.BadParameter(f"expected a positive whole number or 'all', got {value!r}", param_hint="--shots")
    return [value if value == "all" else int(value) for value in values]
