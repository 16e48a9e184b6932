"""Manifests: tables with a row for each image, as ``.csv``, ``.tsv``, ``.jsonl`` or ``.parquet``."""

from __future__ import annotations

import csv
import io
import json
import posixpath
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from textwrap import shorten

from features_cache import nearest
from pipeline.errors import SourceError, UnreadableImageError
from pipeline.images.ahead import map_ahead
from pipeline.images.sources.folder import unnoticed
from pipeline.images.sources.items import (
    ImageSource,
    Item,
    Location,
    build_source,
    is_file_of,
    read_file,
    stamp,
)
from pipeline.images.sources.remote import LISTED_AT_ONCE, RemotePath, Stamp, is_url, locate
from pipeline.tables import SPLIT_WORDS, text_of

COLUMNS = ("path", "label", "split", "group")
"""The columns that are read. Only the first is required; all others are ignored."""

SYNONYMS = {
    "label": ("class", "target", "category", "labels", "class_name"),
    "split": ("subset", "set", "fold", "partition", "splits"),
}
"""Columns that are named to the user where the one that would be read is missing."""

SEPARATORS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar"}
"""What may separate columns, the most likely first, with its name."""

MESSAGE_LENGTH = 120

Rows = Sequence[tuple[int, list[str]]]
"""Cells as text; each row comes with its number in the file, for messages."""


def open_manifest(path: Location) -> ImageSource | None:
    """Return the images that a table lists; None if `path` is none.

    A ``.csv`` or ``.tsv`` is in UTF-8, with or without a byte-order mark; the first line tells whether commas, tabs,
    semicolons or bars separate the columns. A ``.jsonl`` has an object in each line. Numbers and nulls become text.
    Paths are URLs, or relative to the manifest. A row whose file cannot be read is kept: it becomes an unreadable row.

    Raises
    ------
    SourceError
        It is not UTF-8, not a table, has no ``path`` column, an unknown split or the same path twice, or pyarrow, which
        reads Parquet, is not installed.
    """
    if is_file_of(path, {".csv", ".tsv"}):
        header, rows = _read_csv(path)
        return _open_table(path, _columns(path, header), rows, header)
    if is_file_of(path, {".jsonl"}):
        header, rows = _read_jsonl(path)
        return _open_table(path, _columns(path, header), rows, header)
    if is_file_of(path, {".parquet"}):
        return _open_parquet(path)
    return None


def _read_text(path: Location) -> str:
    try:
        text = read_file(path).decode("utf-8-sig")
    except UnreadableImageError as error:
        raise SourceError(f"{path}: expected a manifest that can be read: {error}") from None
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: expected UTF-8 text, found another encoding at byte {error.start}") from None
    if "\0" in text:
        raise SourceError(f"{path}: expected a text table, found a NUL character: save it as UTF-8")
    return text


def _read_csv(path: Location) -> tuple[list[str], Rows]:
    text = _read_text(path)
    (first_line,) = re.match(r"[\r\n]*([^\r\n]*)", text).groups()  # type: ignore[union-attr]  # it always matches
    cells = {one: [cell.strip(' "').lower() for cell in first_line.split(one)] for one in SEPARATORS}
    separator = max(SEPARATORS, key=lambda one: ("path" in cells[one], len(cells[one])))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        table = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        kind = SEPARATORS[separator]
        raise SourceError(f"{path}: expected a {kind}-separated table, line {reader.line_num}: {error}") from None
    return (table[0][1], table[1:]) if table else ([], [])


def _read_jsonl(path: Location) -> tuple[list[str], Rows]:
    objects: list[tuple[int, dict[str, object]]] = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            raise SourceError(f"{path}: expected a JSON object in line {number}, found no JSON") from None
        if not isinstance(found, dict):
            raise SourceError(f"{path}: expected a JSON object in line {number}, found {type(found).__name__}")
        objects.append((number, found))
    header = list(dict.fromkeys(name for _, found in objects for name in found))
    wanted = {name for name in header if name.strip().lower() in COLUMNS}
    for number, found in objects:
        for name in wanted & found.keys():
            if isinstance(found[name], list | dict):
                raise SourceError(f"{path}: expected numbers or text for {name!r} in line {number}, found several")
    rows = [
        (number, [text_of(found.get(name)) if name in wanted else "" for name in header]) for number, found in objects
    ]
    return header, rows


def _open_parquet(path: Location) -> ImageSource:
    try:
        import pyarrow as pa  # late: an optional dependency
        import pyarrow.parquet as pq
    except ImportError:
        raise SourceError(f"{path}: reading Parquet needs pyarrow: pip install 'thawline[parquet]'") from None
    try:
        with pq.ParquetFile(path.open() if isinstance(path, RemotePath) else str(path)) as file:
            header = file.schema_arrow.names
            wanted = [name for name, meaning in zip(header, _columns(path, header), strict=True) if meaning in COLUMNS]
            columns = file.read(columns=wanted).to_pydict()  # others may hold whole images
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{path}: expected a Parquet table: {shorten(str(error), MESSAGE_LENGTH)}") from None
    rows = zip(*(map(text_of, columns[name]) for name in wanted), strict=True)
    numbered = [(number, list(row)) for number, row in enumerate(rows, start=1)]
    return _open_table(path, _columns(path, wanted), numbered, header)


def columns_by_meaning(path: Location, header: Iterable[str]) -> dict[str, str]:
    """Return the columns that are read, as the file writes them, by their names in `COLUMNS`.

    Raises `SourceError` if there are two of one name.
    """
    found = [(name.strip().lower(), name) for name in header if name.strip().lower() in COLUMNS]
    for name, count in Counter(name for name, _ in found).items():
        if count > 1:
            raise SourceError(f"{path}: expected one column {name!r}, found {count}")
    return dict(found)


def _columns(path: Location, header: list[str]) -> list[str]:
    """Return the names of the columns in lower case, after checking them."""
    if "path" not in columns_by_meaning(path, header):
        found = shorten(", ".join(header), MESSAGE_LENGTH) if header else "an empty file"
        raise SourceError(f"{path}: expected a column 'path', found {found}")
    return [name.strip().lower() for name in header]


def synonyms_beside(path: Location, header: Iterable[str]) -> Iterator[str]:
    """Name the columns of `header` that may hold what a missing column would."""
    names = [name.strip().lower() for name in header]
    for column, synonyms in SYNONYMS.items():
        found = [name for name in names if name in synonyms]
        if column not in names and found:
            yield f"{path.name} has no column '{column}' but '{found[0]}', which is not read: rename it if it fits"


def _open_table(path: Location, names: list[str], rows: Rows, header: list[str]) -> ImageSource:
    """Return the source of a parsed table; `names` are the columns of `rows`, `header` all columns of the file."""
    if not rows:
        raise SourceError(f"{path}: expected at least one row below the header, found none")
    labelled = list(_labelled(path, names, rows))
    images = _locations(path.parent, [item.uri for item, _ in labelled])
    is_web = {uri for uri, image in images.items() if isinstance(image, RemotePath) and image.is_http}
    found = _stamped(images)
    stamped = ((item._replace(**found[item.uri]._asdict()), label) for item, label in labelled)
    source = build_source(
        f"{path.parent.name}-{path.stem}", path.as_posix(), stamped, lambda item: read_file(images[item.uri])
    )
    remarks = [*synonyms_beside(path, header), *unnoticed(item for item in source.items if item.uri in is_web)]
    remote = any(isinstance(image, RemotePath) for image in images.values())
    return replace(source, remarks=(*source.remarks, *remarks), remote=remote)


def _labelled(path: Location, names: list[str], rows: Rows) -> Iterator[tuple[Item, str]]:
    seen: dict[str, int] = {}
    for number, row in rows:
        if len(row) != len(names):
            raise SourceError(f"{path}: expected {len(names)} fields in row {number}, found {len(row)}")
        cells = dict(zip(names, (cell.strip() for cell in row), strict=True))
        if not cells["path"]:
            raise SourceError(f"{path}: expected a path in row {number}, found none")
        uri = cells["path"] if is_url(cells["path"]) else posixpath.normpath(Path(cells["path"]).as_posix())
        if uri in seen:
            raise SourceError(f"{path}: expected each path once, found {uri!r} in rows {seen[uri]} and {number}")
        if isinstance(path, RemotePath) and (uri.startswith("/") or uri.lower().startswith(("file:", "local:"))):
            raise SourceError(
                f"{path}: expected a path relative to the manifest or a URL in row {number}, found {uri!r}"
            )
        seen[uri] = number
        yield (
            Item(uri, split=split_of(path, number, cells.get("split", "")), group=cells.get("group", "")),
            cells.get("label", ""),
        )


def split_of(path: Location, number: int, word: str) -> str:
    """Return the split that a table's row names, ``""`` for none; raises `SourceError` if it is not known."""
    if word and word.lower() not in SPLIT_WORDS:
        hint = nearest(word.lower(), SPLIT_WORDS)
        raise SourceError(f"{path}: expected split train, val, test or none in row {number}, found {word!r}{hint}")
    return SPLIT_WORDS[word.lower()] if word else ""


def _locations(folder: Location, uris: Iterable[str]) -> dict[str, Location]:
    """Return where images are; the library of a protocol is opened once for each server or bucket."""
    return {uri: locate(uri) if is_url(uri) else folder / uri for uri in uris}


def _stamped(images: Mapping[str, Location]) -> dict[str, Stamp]:
    """Return what tells whether images change, by listing the folders that remote ones are in, never one by one.

    Web servers are not asked: they tell nothing.
    """
    folders: dict[Hashable, RemotePath] = {}
    for image in images.values():
        if isinstance(image, RemotePath) and not image.is_http:
            folders.setdefault(image.parent.key, image.parent)
    listings = map_ahead(RemotePath.listing, folders.values(), LISTED_AT_ONCE, LISTED_AT_ONCE)
    listed = {file.key: file.stat() for listing in listings for file in listing.values()}
    return {
        uri: listed.get(image.key, Stamp()) if isinstance(image, RemotePath) else _stamp(image)
        for uri, image in images.items()
    }


def _stamp(path: Path) -> Stamp:
    try:
        return stamp(path)
    except (OSError, ValueError):  # reading it will tell why
        return Stamp()
