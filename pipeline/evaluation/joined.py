"""Columns of a table that stand beside the features of each image: numbers, and categories as columns of 0 and 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray

from pipeline.arrays import BoolArray, Float32Array, Float64Array, IntArray, StrArray
from pipeline.errors import TableError
from pipeline.evaluation.keyed import KeyedTable, each_once, key_column, require_columns
from pipeline.evaluation.targets import finite_number, require_spread, some
from pipeline.tables import read_columns

MOST_CATEGORIES = 1000
"""Of a column; more of them name rows, not kinds of rows."""

_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class JoinedColumn:
    """A column of a table that heads read beside features.

    Parameters
    ----------
    name : str
    categories : tuple of str or None
        Each of them a column of 0 and 1; None for a column of numbers.
    """

    name: str
    categories: tuple[str, ...] | None = None

    @property
    def dim(self) -> int:
        """How many features it becomes."""
        return 1 if self.categories is None else len(self.categories)

    def read(self, cells: Sequence[str], where: str) -> NDArray[Any]:
        """Return numbers (n,) of float32 or numbers of categories (n,) of int64, -1 for one that is not known.

        Raises `TableError` if a cell of a column of numbers is none; `where` names the column.
        """
        if self.categories is not None:
            numbers = {category: number for number, category in enumerate(self.categories)}
            return np.array([numbers.get(normalize("NFC", cell), -1) for cell in cells], np.int64)
        known = {cell: finite_number(cell) for cell in dict.fromkeys(cells)}
        for cell, number in known.items():
            if number is None or abs(number) > _LARGEST:
                raise TableError(f"{where}: expected numbers, found {cell!r}; leave a cell empty if it is not known")
        return np.array([known[cell] for cell in cells], np.float32)

    def spread(self, cells: NDArray[Any], known: BoolArray) -> NDArray[Any]:
        """Return cells of the rows that are `known` among all n rows; others are 0, or of no category."""
        found = np.full(len(known), 0 if self.categories is None else -1, cells.dtype)
        found[known] = cells
        return found

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> JoinedColumn:
        """Return the column of which `is_joined_column` is true."""
        return cls(told["name"], None if told["categories"] is None else tuple(told["categories"]))

    def to_json(self) -> dict[str, Any]:
        """Return what `is_joined_column` takes."""
        return {"name": self.name, "categories": None if self.categories is None else list(self.categories)}


class Moments(NamedTuple):
    """What is subtracted from joined columns, and what they are then divided by, as features (d,).

    Numbers become standardised, categories stay 0 or 1, and what does not vary in these rows becomes 0. `columns` is
    the number of columns, whatever the number of features they become.
    """

    mean: Float64Array
    scale: Float64Array
    columns: int


@dataclass(frozen=True, eq=False)
class JoinedColumns:
    """Joined columns and their cells in n rows.

    Parameters
    ----------
    columns : tuple of JoinedColumn
    cells : tuple of (n,) array
        As `JoinedColumn.read` returns them.
    """

    columns: tuple[JoinedColumn, ...]
    cells: tuple[NDArray[Any], ...]

    @property
    def names(self) -> list[str]:
        """Names of the columns."""
        return [column.name for column in self.columns]

    @property
    def dim(self) -> int:
        """How many features they become."""
        return sum(column.dim for column in self.columns)

    def take(self, index: IntArray) -> JoinedColumns:
        """Return the rows `index` (k,)."""
        return JoinedColumns(self.columns, tuple(cells[index] for cells in self.cells))

    def features(self, index: IntArray) -> Float32Array:
        """Return the rows `index` (k,) as features (k, dim): numbers as they are, and categories as 0 and 1."""
        return np.hstack(
            [
                (cells[index, None] if column.categories is None else cells[index, None] == np.arange(column.dim))
                for column, cells in zip(self.columns, self.cells, strict=True)
            ],
            dtype=np.float32,
        )

    def moments(self, index: IntArray) -> Moments:
        """Return the moments of the rows `index` (k,)."""
        parts = []
        for column, cells in zip(self.columns, self.cells, strict=True):
            if column.categories is None:
                own = cells[index].astype(np.float64)
                parts.append((own.mean(keepdims=True), own.std(keepdims=True) if np.ptp(own) else np.full(1, np.inf)))
            else:
                counts = np.bincount(cells[index] + 1, minlength=column.dim + 1)[1:]
                parts.append((np.zeros(column.dim), np.where((counts > 0) & (counts < len(index)), 1.0, np.inf)))
        mean, scale = (np.concatenate(part) for part in zip(*parts, strict=True))
        return Moments(mean, scale, len(self.columns))


def is_joined_column(told: Any) -> bool:
    """Tell whether a saved model's description has a column as `JoinedColumn.to_json` gives it."""
    if not isinstance(told, dict) or not isinstance(told.get("name"), str):
        return False
    names = told.get("categories", ...)
    if names is None:
        return True
    return isinstance(names, list) and bool(names) and all(isinstance(one, str) for one in names)


def join_columns(table: KeyedTable, found: IntArray, used: BoolArray) -> JoinedColumns:
    """Read the joined columns of a table for the rows of a cache.

    Parameters
    ----------
    table : KeyedTable
    found : (n,) int64
        The row of the table for each row of the cache, see `KeyedTable.find`.
    used : (n,) bool
        The rows that count; the others hold 0 or no category.

    Raises
    ------
    TableError
        If a column says the same of all these rows, holds text and numbers, or too many categories.
    """
    columns, cells = [], []
    for name, told in table.joined.items():
        own = [told[row] for row in found[used].tolist()]
        where = f"column '{name}' of {table.path.name}"
        column = _column_of(name, own, where)
        read = column.read(own, where)
        columns.append(column)
        cells.append(column.spread(read, used))
    return JoinedColumns(tuple(columns), tuple(cells))


def read_table(path: str | Path, columns: Sequence[JoinedColumn], key: str | None = None) -> KeyedTable:
    """Read the columns that a model reads, for new images.

    Parameters
    ----------
    path : str or Path
        See `pipeline.tables.read_columns`.
    columns : sequence of JoinedColumn
    key : str, optional
        The column that names images: by default the first that is called as one of `pipeline.evaluation.keyed.KEYS`.

    Raises
    ------
    TableError
        If a column is missing, an image is named twice with different cells, or a cell is not the number it should be.
    """
    path, names = Path(path), [column.name for column in columns]
    keys: list[str] = []

    def choose(header: Sequence[str]) -> list[str]:
        require_columns(path, header, [*names, *([] if key is None else [key])])
        keys.append(key_column(path, header, key, names))
        return [*keys, *names]

    read = read_columns(path, choose)
    cells = each_once(path, keys[0], read)
    for column in columns:
        told = [cell for cell in cells[column.name] if cell]
        column.read(told, f"column '{column.name}' of {path.name}")
    return KeyedTable(path, cells[keys[0]], {name: cells[name] for name in names})


def place_columns(
    table: KeyedTable, columns: Sequence[JoinedColumn], uris: StrArray
) -> tuple[JoinedColumns, list[str], list[str]]:
    """Read the columns that a model reads for images (n,).

    Returns
    -------
    columns : JoinedColumns
        Of the images; 0 or no category where the table does not say.
    reasons : list of str
        Why an image has no columns, ``""`` if it has.
    notes : list of str
        What a user should know about where these came from.
    """
    way, found = table.find(uris)
    reasons = table.reasons(found, way)
    known = np.array([not reason for reason in reasons])
    notes = [f"{', '.join(table.joined)} come from {table.path.name}, joined by {way}"]
    notes += table.left_out(uris, found, way, {})
    placed = []
    for column in columns:
        where = f"column '{column.name}' of {table.path.name}"
        own = [table.joined[column.name][row] for row in found[known].tolist()]
        cells = column.read(own, where)
        if column.categories is not None and (cells < 0).any():
            strange = list(dict.fromkeys(own[row] for row in np.flatnonzero(cells < 0).tolist()))
            count = f"{int((cells < 0).sum())} of {len(cells)} images"
            notes.append(f"{where}: {count} have categories that the model never saw: {some(strange, len(strange))}")
        placed.append(column.spread(cells, known))
    return JoinedColumns(tuple(columns), tuple(placed)), reasons, notes


def _column_of(name: str, cells: Sequence[str], where: str) -> JoinedColumn:
    """Return numbers if all cells are numbers, categories if none is."""
    different = list(dict.fromkeys(cells))
    numbers = [cell for cell in different if finite_number(cell) is not None]
    words = sorted({normalize("NFC", cell) for cell in different if finite_number(cell) is None})
    if numbers and words:
        raise TableError(
            f"{where} mixes numbers with text, such as {numbers[0]!r} and {words[0]!r}; leave cells empty that are not "
            "known, or write categories as words"
        )
    if numbers:
        require_spread(np.array(numbers, np.float64), where, "it adds nothing to the features")
        return JoinedColumn(name)
    if len(words) == 1:
        raise TableError(f"{where} is {words[0]!r} for all images, so it adds nothing to the features")
    if len(words) > MOST_CATEGORIES:
        raise TableError(f"{where} has {len(words)} different texts, and at most {MOST_CATEGORIES} can be categories")
    return JoinedColumn(name, tuple(words))
