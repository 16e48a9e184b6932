"""Tables in files, read as columns of text: separated text, JSON lines, or Parquet."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from features_cache import nearest_beside
from pipeline.errors import TableError, first_line

ENDINGS = (".csv", ".tsv", ".jsonl", ".parquet")
SEPARATORS = ",;\t"
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

_CHUNK = 1 << 12
Choose = Callable[[Sequence[str]], Sequence[str]]


def read_columns(path: Path, choose: Choose) -> dict[str, list[str]]:
    """Read some columns of a table; equal cells share one text, so that memory suffices for millions of rows.

    Parameters
    ----------
    path : Path
        ``.csv`` and ``.tsv`` are UTF-8 with a header; commas, semicolons and tabs are told apart by it. Of ``.jsonl``,
        the object on the first line names the columns, and a key that another line lacks is an empty cell.
        ``.parquet`` needs pyarrow.
    choose : callable
        Gets the names of all columns, and returns those to read.

    Returns
    -------
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
        return readers[path.suffix.lower()](path, choose)


def text_of(value: object) -> str:
    """Return a cell that came as text or number: 1 and 1.0 are ``"1"``, None and NaN are ``""``."""
    if value is None or value != value:  # NaN, a missing number in a data frame
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _read_separated(path: Path, choose: Choose) -> dict[str, list[str]]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        first = stream.readline()
        separator = max(SEPARATORS, key=first.count)
        header = [name.strip() for name in next(csv.reader([first], delimiter=separator), [])]
        rows = csv.reader(stream, strict=True, delimiter=separator)
        try:
            chunks = iter(lambda: list(itertools.islice(filter(None, rows), _CHUNK)), [])
            return _collect(path, header, choose, (_turned(path, header, chunk) for chunk in chunks))
        except csv.Error as error:
            raise TableError(f"{path}: expected separated text, line {rows.line_num + 1}: {error}") from None


def _turned(path: Path, header: Sequence[str], rows: Sequence[list[str]]) -> dict[str, Sequence[Any]]:
    """Return rows of text as columns."""
    if set(map(len, rows)) != {len(header)}:
        row = next(row for row in rows if len(row) != len(header))
        raise TableError(f"{path}: expected {len(header)} fields in each row, found {len(row)} in {row!r:.60}")
    return dict(zip(header, zip(*rows, strict=True), strict=True))


def _read_json(path: Path, choose: Choose) -> dict[str, list[str]]:
    with path.open(encoding="utf-8-sig") as stream:
        lines = (json.loads(line) for line in stream if line.strip())
        chunks = iter(lambda: list(itertools.islice(lines, _CHUNK)), [])
        first: list[Any] = next(chunks, [{}])
        header = list(first[0]) if isinstance(first[0], dict) else []

        def turned(rows: Sequence[Any]) -> dict[str, Sequence[Any]]:
            for row in rows:
                if not isinstance(row, dict):
                    raise TableError(f"{path}: expected a JSON object on each line, found {row!r:.60}")
            return {name: [row.get(name) for row in rows] for name in header}

        return _collect(path, header, choose, map(turned, itertools.chain([first], chunks)))


def _read_parquet(path: Path, choose: Choose) -> dict[str, list[str]]:
    try:
        import pyarrow as pa  # late: an optional dependency
        import pyarrow.parquet as pq
    except ImportError:
        raise TableError(f"{path}: reading Parquet needs pyarrow: pip install 'thawline[parquet]'") from None
    try:
        with pq.ParquetFile(path) as table:
            header = table.schema_arrow.names
            batches = table.iter_batches(_CHUNK, columns=list(_chosen(path, header, choose)))
            return _collect(path, header, choose, (batch.to_pydict() for batch in batches))
    except pa.ArrowException as error:
        raise TableError(f"{path}: expected a Parquet table: {first_line(error)}") from None


def _collect(
    path: Path, header: Sequence[str], choose: Choose, chunks: Iterator[dict[str, Sequence[Any]]]
) -> dict[str, list[str]]:
    """Return the chosen columns of all chunks."""
    columns: dict[str, list[str]] = {name: [] for name in _chosen(path, header, choose)}
    shared: dict[str, dict[str, str]] = {name: {} for name in columns}
    for chunk in chunks:
        for name, column in columns.items():
            cells, known = chunk[name], shared[name]
            if set(map(type, cells)) != {str}:
                cells = list(map(text_of, cells))
            texts = list(map(str.strip, cells))
            repeats = len(known) < len(column) // 2 + _CHUNK
            column += map(known.setdefault, texts, texts) if repeats else texts
    return columns


def _chosen(path: Path, header: Sequence[str], choose: Choose) -> list[str]:
    if not any(header):
        raise TableError(f"{path}: expected the names of the columns in the first line, found none")
    chosen = list(choose(header))
    for name in chosen:
        if header.count(name) > 1:
            raise TableError(f"{path}: expected one column {name!r}, found {header.count(name)}")
    return chosen


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what reading a table raises into one line."""
    try:
        yield
    except OSError as error:
        raise TableError(f"{path}: cannot read the table: {error.strerror or error}{nearest_beside(path)}") from None
    except UnicodeDecodeError as error:
        raise TableError(f"{path}: expected UTF-8 text, found another encoding at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise TableError(f"{path}: expected a JSON object on each line: {error}") from None
