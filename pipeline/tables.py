"""Tables in files, read as columns of text: separated text, JSON lines, or Parquet."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any, Protocol

from features_cache import nearest_beside
from pipeline.errors import TableError

ENDINGS = (".csv", ".tsv", ".jsonl", ".parquet")
SEPARATORS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar"}
"""What may separate columns, the most likely first, with its name."""
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
"""What folders, tables and names of shards call a split, in lower case, and its name here."""
MESSAGE_LENGTH = 120

_CHUNK = 1 << 12
_LINES = 1 << 8  # that are turned into columns at once: few enough for the processor's cache, which halves the time
_Chunk = dict[str, Sequence[Any]]
Choose = Callable[[Sequence[str]], Sequence[str]]


class TableFile(Protocol):
    """A file on this machine or elsewhere; `pathlib.Path` is one."""

    @property
    def suffix(self) -> str:
        """The extension of the name, with its dot."""

    def open(self, mode: str) -> Any:
        """Return the file, opened for reading bytes."""


def read_columns(path: TableFile, choose: Choose) -> dict[str, list[str]]:
    """Return some columns of a table; equal cells share one text, so that memory suffices for millions of rows.

    Parameters and errors are those of `read_chunks`.
    """
    columns: dict[str, list[str]] = {}
    shared: dict[str, dict[str, str]] = {}
    for chunk in read_chunks(path, choose):
        for name, cells in chunk.items():
            column, known = columns.setdefault(name, []), shared.setdefault(name, {})
            repeats = len(known) < len(column) // 2 + _CHUNK
            column += map(known.setdefault, cells, cells) if repeats else cells
    return columns


def read_chunks(path: TableFile, choose: Choose) -> Iterator[dict[str, list[str]]]:
    """Yield some columns of a table, for some rows at a time; the first chunk has no rows.

    Parameters
    ----------
    path : Path
        ``.csv`` and ``.tsv`` are UTF-8 with a header, which tells whether commas, tabs, semicolons or bars separate the
        columns. A ``.jsonl`` has an object in each line, and a key that it lacks is an empty cell. ``.parquet`` needs
        pyarrow.
    choose : callable
        Gets the names of all columns, and returns those to read.

    Yields
    ------
    dict of str to list of str
        Cells without blanks around them. Numbers and nulls are as in `text_of`.

    Raises
    ------
    TableError
        If the file is not such a table.
    """
    readers = {".csv": _read_separated, ".tsv": _read_separated, ".jsonl": _read_json, ".parquet": _read_parquet}
    if path.suffix.lower() not in readers:
        raise TableError(f"{path}: expected a table that ends in {', '.join(ENDINGS)}")
    with _explained(path):
        for chunk in readers[path.suffix.lower()](path, choose):
            yield {name: _texts(path, name, cells) for name, cells in chunk.items()}


def row_number(path: TableFile, index: int) -> int:
    """Return the number of a row for messages: from 1, with the header as the first row of separated text."""
    return index + (2 if path.suffix.lower() in (".csv", ".tsv") else 1)


def text_of(value: object) -> str:
    """Return a cell that came as text or number: 1 and 1.0 are ``"1"``, None and NaN are ``""``."""
    if value is None or value != value:  # NaN, a missing number in a data frame
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _read_separated(path: TableFile, choose: Choose) -> Iterator[_Chunk]:
    with _text(path) as stream:
        skipped, first = next(((blank, line) for blank, line in enumerate(stream) if line.strip()), (0, ""))
        if "\0" in first:
            raise TableError(f"{path}: expected a text table, found a NUL character: save it as UTF-8")
        separator = max(SEPARATORS, key=first.count)
        reader = csv.reader(stream, strict=True, delimiter=separator)
        try:
            header = [name.strip() for name in next(csv.reader([first], delimiter=separator), [])]
            wanted = _chosen(path, header, choose)
            yield dict.fromkeys(wanted, ())
            for chunk in _turned(path, header, filter(None, reader)):
                yield {name: chunk[name] for name in wanted}
        except csv.Error as error:
            line, kind = skipped + 1 + reader.line_num, SEPARATORS[separator]
            raise TableError(f"{path}: expected a {kind}-separated table, line {line}: {error}") from None


def _turned(path: TableFile, header: Sequence[str], rows: Iterator[list[str]]) -> Iterator[_Chunk]:
    """Yield rows of text as columns."""
    done = 0
    while chunk := list(itertools.islice(rows, _LINES)):
        if set(map(len, chunk)) != {len(header)}:
            index, row = next((index, row) for index, row in enumerate(chunk) if len(row) != len(header))
            number = row_number(path, done + index)
            raise TableError(f"{path}: expected {len(header)} fields in row {number}, found {len(row)}")
        yield dict(zip(header, zip(*chunk, strict=True), strict=True))
        done += len(chunk)


def _read_json(path: TableFile, choose: Choose) -> Iterator[_Chunk]:
    with _text(path) as stream:
        names: dict[str, Any] = {}
        for _, found in _objects(path, stream):
            names.update(found)
    wanted = _chosen(path, list(names), choose)
    yield dict.fromkeys(wanted, ())
    with _text(path) as stream:
        objects = _objects(path, stream)
        while chunk := list(itertools.islice(objects, _LINES)):
            columns: _Chunk = {name: [found.get(name) for _, found in chunk] for name in wanted}
            for name, cells in columns.items():
                if not {list, dict}.isdisjoint(map(type, cells)):
                    line = next(line for line, found in chunk if isinstance(found.get(name), list | dict))
                    raise TableError(f"{path}: expected numbers or text for {name!r} in line {line}, found several")
            yield columns


def _objects(path: TableFile, stream: io.TextIOBase) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the objects of JSON lines with the numbers of their lines."""
    decode = json.JSONDecoder().raw_decode  # half the time of `json.loads`
    for number, line in enumerate(stream, start=1):
        if not (text := line.strip()):
            continue
        try:
            found, end = decode(text)
        except (ValueError, RecursionError):
            end = -1
        if end != len(text):
            raise TableError(f"{path}: expected a JSON object in line {number}, found no JSON") from None
        if not isinstance(found, dict):
            raise TableError(f"{path}: expected a JSON object in line {number}, found {type(found).__name__}")
        yield number, found


def _read_parquet(path: TableFile, choose: Choose) -> Iterator[_Chunk]:
    try:
        import pyarrow as pa  # late: an optional dependency
        import pyarrow.parquet as pq
    except ImportError:
        raise TableError(f"{path}: reading Parquet needs pyarrow: pip install 'thawline[parquet]'") from None
    try:
        with path.open("rb") as stream, pq.ParquetFile(stream) as table:
            wanted = _chosen(path, table.schema_arrow.names, choose)
            yield dict.fromkeys(wanted, ())
            for batch in table.iter_batches(_CHUNK, columns=wanted):  # other columns may hold whole images
                yield batch.to_pydict()
    except pa.ArrowException as error:
        message = shorten(str(error), MESSAGE_LENGTH)
        raise TableError(f"{path}: expected a Parquet table: {message}") from None


def _chosen(path: TableFile, header: Sequence[str], choose: Choose) -> list[str]:
    """Return the columns to read; each must be there once."""
    if not any(header):
        raise TableError(f"{path}: expected the names of the columns, found an empty file")
    chosen = list(choose(header))
    for name in chosen:
        if header.count(name) > 1:
            raise TableError(f"{path}: expected one column {name!r}, found {header.count(name)}")
    return chosen


def _texts(path: TableFile, name: str, cells: Sequence[Any]) -> list[str]:
    """Return the cells of a column as text without blanks around it."""
    if not set(map(type, cells)) <= {str}:
        if (found := next((cell for cell in cells if isinstance(cell, bytes | list | dict)), None)) is not None:
            raise TableError(f"{path}: expected numbers or text in column {name!r}, found {type(found).__name__}")
        cells = list(map(text_of, cells))
    return list(map(str.strip, cells))


@contextmanager
def _text(path: TableFile) -> Iterator[io.TextIOBase]:
    with path.open("rb") as raw:
        buffered = io.BufferedReader(raw) if isinstance(raw, io.RawIOBase) else raw
        with io.TextIOWrapper(buffered, encoding="utf-8-sig", newline="") as stream:
            yield stream


@contextmanager
def _explained(path: Any) -> Iterator[None]:
    """Turn what reading a table raises into one line."""
    try:
        yield
    except OSError as error:
        hint = nearest_beside(path) if isinstance(path, Path) else ""
        raise TableError(f"{path}: cannot read the table: {error.strerror or error}{hint}") from None
    except UnicodeDecodeError:
        raise TableError(f"{path}: expected UTF-8 text, found another encoding") from None
