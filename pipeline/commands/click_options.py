"""The options of `pipeline.options` as click's."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from pipeline.options import (
    COMMANDS,
    JSON,
    File,
    Flag,
    Folder,
    Kind,
    Number,
    OneOf,
    Option,
    Rate,
    Shots,
    Whole,
    parse_rate,
)

Command = TypeVar("Command", bound=Callable[..., None])


def options_of(command: str) -> Callable[[Command], Command]:
    """Return a decorator that gives a command its options, ``--json`` among them."""

    def add(function: Command) -> Command:
        for option in reversed((*COMMANDS[command], JSON)):
            function = _click_option(option)(function)
        return function

    return add


def _click_option(option: Option) -> Callable[[Command], Command]:
    names = [f"-{option.short}"] if option.short else []
    names += [f"--{option.name}", option.parameter]
    if isinstance(option.kind, Flag):
        return click.option(*names, is_flag=True, help=option.help)
    default = "auto" if isinstance(option.kind, Whole) and option.kind.auto else option.default
    return click.option(
        *names,
        type=_click_type(option.kind),
        default=[default] if option.repeat and default is not None else default,
        multiple=option.repeat,
        callback=_parse_all(option.kind) if option.repeat else None,
        required=option.required,
        help=option.help,
    )


def _click_type(kind: Kind) -> Any:
    match kind:
        case OneOf():
            return click.Choice(kind.names)
        case Whole():
            return _WholeOrAuto(kind.min) if kind.auto else click.IntRange(kind.min)
        case Number():
            return click.FloatRange(kind.min, kind.max if kind.max < math.inf else None, kind.min_open, kind.max_open)
        case File():
            return click.Path(dir_okay=False, path_type=Path)
        case Folder():
            return click.Path(file_okay=False, path_type=Path)
    return str


def _parse_all(kind: Kind) -> Callable[[click.Context, click.Parameter, tuple[Any, ...]], tuple[Any, ...] | None]:
    """Return a callback for the values of a repeated option; the stage gets None where none was given."""

    def parse(_: click.Context, __: click.Parameter, values: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return tuple(_parse(kind, value) for value in values) or None

    return parse


def _parse(kind: Kind, value: Any) -> Any:
    if isinstance(kind, Shots) and value.isdecimal():
        value = int(value)
    if problem := kind.problem(value):
        raise click.BadParameter(problem)
    return parse_rate(value) if isinstance(kind, Rate) else value


class _WholeOrAuto(click.IntRange):
    """A whole number, or ``auto``, which the stage gets as None."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return None if value == "auto" else super().convert(value, param, ctx)
