"""Errors of the stages; all belong to the one family in `features_cache.errors`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from features_cache import ThawlineError


class SourceError(ThawlineError):
    """An image source is missing, empty, of no known form, or contradicts itself."""


class TableError(ThawlineError):
    """A table of labels cannot be read, or lacks a column."""


class UnreadableImageError(ThawlineError):
    """One image cannot be decoded; the message is the short reason kept with its row."""


class BackboneError(ThawlineError):
    """A backbone, its weights, or one of its layers cannot be had."""


class EngineError(ThawlineError):
    """The asked engine, device or precision does not exist on this machine."""


class FitError(ThawlineError):
    """The cached rows do not allow what a head was asked to do."""


class ModelFileError(ThawlineError):
    """A saved model is damaged, foreign, of another version, or does not match its backbone."""


class PlanError(ThawlineError):
    """A plan is no TOML, or asks for what does not exist; the message names file and line."""


class RunFolderError(ThawlineError):
    """A run folder belongs to another plan, is in use, or cannot be read or written."""


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error, 200 characters at most; its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


def first_cause(error: BaseException) -> BaseException:
    """Return the error that began a chain of errors, where libraries wrap the one that says what is wrong."""
    return error if error.__cause__ is None else first_cause(error.__cause__)


def one_line(error: Exception) -> str:
    """Return all of another library's error in one line, 500 characters at most, where its first line says little."""
    return " ".join(str(error).split())[:500] or type(error).__name__


@contextmanager
def resumable() -> Iterator[None]:
    """Note on an interrupt that nothing is lost, for work whose parts are kept as they come; also a decorator."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        interrupt.add_note("what was finished is kept, and the same command goes on from there")
        raise
