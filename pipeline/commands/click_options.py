"""The options of `pipeline.options` as click's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click

from pipeline.options import (
    COMMANDS,
    FILE,
    FLAG,
    FOLDER,
    INPUT_SIZE,
    JSON,
    LEAKS,
    NEAR,
    RATE,
    SHOTS_OR_ALL,
    Kind,
    Option,
    parse_rate,
)
from pipeline.spec import parse_size

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
    if option.kind is FLAG:
        return click.option(*names, is_flag=True, help=option.help)
    if option.kind is LEAKS:
        kind = click.Choice([_ALONE, NEAR])
        return click.option(*names, type=kind, metavar=f"[{NEAR}]", callback=_parse_leaks, help=option.help)
    default = "auto" if option.auto else option.default
    return click.option(
        *names,
        type=_click_type(option),
        default=[default] if option.repeat and default is not None else default,
        multiple=bool(option.repeat),
        required=option.required,
        callback=partial(_parse, option),
        help=f"{option.help} Can be repeated." if option.repeat else option.help,
    )


_ALONE = "bytes"
"""What stands for an option of the kind `LEAKS` without a value."""


class ValueMayFollow(click.Command):
    """A command whose ``--drop-leaks`` takes `NEAR` or nothing: whatever else follows it is an argument."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Give the option a value where it has none."""
        told = zip(args, [*args[1:], ""], strict=True)
        return super().parse_args(
            ctx, [f"{one}={_ALONE}" if one == "--drop-leaks" and after != NEAR else one for one, after in told]
        )


def _parse_leaks(_: click.Context, __: click.Parameter, given: str | None) -> bool | str:
    return given is not None if given != NEAR else NEAR


def _click_type(option: Option) -> Any:
    kind = option.kind
    if kind.names:
        return click.Choice(kind.names)
    if kind in (FILE, FOLDER):
        return click.Path(file_okay=kind is FILE, dir_okay=kind is FOLDER, path_type=Path)
    if kind.type is int:
        return _WholeOrAuto(kind.least) if option.auto else click.IntRange(kind.least)
    return float if kind.type is float else str


class _WholeOrAuto(click.IntRange):
    """A whole number, or ``auto``, which the stage gets as None."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return None if value == "auto" else super().convert(value, param, ctx)


def _parse(option: Option, _: click.Context, __: click.Parameter, given: Any) -> Any:
    """Return what the stage gets: None where nothing was given."""
    values = given if option.repeat else (given,)
    parsed = tuple(_parse_one(option.kind, value) for value in values if value is not None)
    if option.repeat:
        return parsed or None
    return parsed[0] if parsed else None


def _parse_one(kind: Kind, value: Any) -> Any:
    if kind is SHOTS_OR_ALL and value.isdecimal():
        value = int(value)
    if problem := kind.problem(value):
        raise click.BadParameter(problem)
    if kind is INPUT_SIZE:
        return parse_size(value)
    return parse_rate(value) if kind is RATE else value
