"""Manifests: tables with a row for each image, as ``.csv`` or ``.parquet``."""

from __future__ import annotations

import csv
import io
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from textwrap import shorten

from features_cache import nearest
from pipeline.errors import SourceError
from pipeline.images.sources.items import ImageSource, Item, build_source, is_file_of, read_file
from pipeline.tables import SPLIT_WORDS, text_of

COLUMNS = ("path", "label", "split", "group")
"""The columns that are read. Only the first is required; all others are ignored."""

SYNONYMS = {
    "label": ("class", "target", "category", "labels", "class_name"),
    "split": ("subset", "set", "fold", "partition", "splits"),
}
"""Columns that are named to the user where the one that would be read is missing."""

MESSAGE_LENGTH = 120


def open_manifest(path: Path) -> ImageSource | None:
    """Return the images that a comma-separated UTF-8 table or a Parquet table lists; None if `path` is neither.

    Paths are relative to the manifest. A row whose file cannot be read is kept: it becomes an unreadable row. Numbers
    and nulls of a Parquet table become text.

    Raises
    ------
    SourceError
        It is not UTF-8, not a table, has no ``path`` column, an unknown split or the same path twice, or pyarrow, which
        reads Parquet, is not installed.
    """
    if is_file_of(path, {".csv"}):
        return _open_csv(path)
    if is_file_of(path, {".parquet"}):
        return _open_parquet(path)
    return None


def _open_csv(path: Path) -> ImageSource:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise SourceError(f"{path}: expected a manifest that can be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: expected UTF-8 text, found another encoding at byte {error.start}") from None
    if "\0" in text:
        raise SourceError(f"{path}: expected a text table, found a NUL character: save it as UTF-8")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        table = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise SourceError(f"{path}: expected a comma-separated table, line {reader.line_num}: {error}") from None
    names = _columns(path, table[0][1] if table else [])
    return _open_table(path, names, table[1:], names)


def _open_parquet(path: Path) -> ImageSource:
    try:
        import pyarrow as pa  # late: an optional dependency
        import pyarrow.parquet as pq
    except ImportError:
        raise SourceError(f"{path}: reading Parquet needs pyarrow: pip install 'thawline[parquet]'") from None
    try:
        header = pq.read_schema(path).names
        wanted = [name for name, meaning in zip(header, _columns(path, header), strict=True) if meaning in COLUMNS]
        columns = pq.read_table(path, columns=wanted).to_pydict()  # others may hold whole images
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{path}: expected a Parquet table: {shorten(str(error), MESSAGE_LENGTH)}") from None
    rows = zip(*(map(text_of, columns[name]) for name in wanted), strict=True)
    numbered = [(number, list(row)) for number, row in enumerate(rows, start=1)]
    return _open_table(path, _columns(path, wanted), numbered, _columns(path, header))


def _columns(path: Path, header: list[str]) -> list[str]:
    """Return the names of the columns in lower case, after checking them."""
    names = [name.strip().lower() for name in header]
    if "path" not in names:
        found = shorten(", ".join(header), MESSAGE_LENGTH) if header else "an empty file"
        raise SourceError(f"{path}: expected a column 'path', found {found}")
    if twice := sorted({name for name in names if name in COLUMNS and names.count(name) > 1}):
        raise SourceError(f"{path}: expected one column {twice[0]!r}, found {names.count(twice[0])}")
    return names


def _open_table(path: Path, names: list[str], rows: Sequence[tuple[int, list[str]]], header: list[str]) -> ImageSource:
    """Return the source of a parsed table; each of `rows` comes with its number in the file, for messages.

    `names` are the columns of `rows`; `header` are all columns of the file.
    """
    if not rows:
        raise SourceError(f"{path}: expected at least one row below the header, found none")
    name = f"{path.parent.name}-{path.stem}"
    labelled = _labelled(path, names, rows)
    source = build_source(name, path.as_posix(), labelled, lambda item: read_file(path.parent / item.uri))
    return replace(source, remarks=(*source.remarks, *_remarks(path, header)))


def _remarks(path: Path, header: list[str]) -> Iterator[str]:
    """Name the columns that may hold what a missing column would."""
    for missing, synonyms in SYNONYMS.items():
        found = [name for name in header if name in synonyms]
        if missing not in header and found:
            yield f"{path.name} has no column '{missing}' but '{found[0]}', which is not read: rename it if it fits"


def _labelled(path: Path, names: list[str], rows: Sequence[tuple[int, list[str]]]) -> Iterator[tuple[Item, str]]:
    seen: dict[str, int] = {}
    for number, row in rows:
        if len(row) != len(names):
            raise SourceError(f"{path}: expected {len(names)} fields in row {number}, found {len(row)}")
        cells = dict(zip(names, (cell.strip() for cell in row), strict=True))
        if not cells["path"]:
            raise SourceError(f"{path}: expected a path in row {number}, found none")
        uri = posixpath.normpath(Path(cells["path"]).as_posix())
        if uri in seen:
            raise SourceError(f"{path}: expected each path once, found {uri!r} in rows {seen[uri]} and {number}")
        seen[uri] = number
        split = _split(path, number, cells.get("split", ""))
        item = _item(path.parent, uri)._replace(split=split, group=cells.get("group", ""))
        yield item, cells.get("label", "")


def _split(path: Path, number: int, word: str) -> str:
    if word and word.lower() not in SPLIT_WORDS:
        hint = nearest(word.lower(), SPLIT_WORDS)
        raise SourceError(f"{path}: expected split train, val, test or none in row {number}, found {word!r}{hint}")
    return SPLIT_WORDS[word.lower()] if word else ""


def _item(folder: Path, uri: str) -> Item:
    try:
        status = (folder / uri).stat()
    except (OSError, ValueError):  # reading it will tell why
        return Item(uri)
    return Item(uri, size=status.st_size, mtime_ns=status.st_mtime_ns)
