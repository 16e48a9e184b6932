"""Manifests: tables with a row for each image, as ``.csv``, ``.tsv``, ``.jsonl`` or ``.parquet``."""

from __future__ import annotations

import os
import posixpath
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np

from features_cache import nearest
from pipeline.errors import SourceError, TableError
from pipeline.images.ahead import map_ahead
from pipeline.images.sources.folder import unnoticed
from pipeline.images.sources.items import (
    ImageSource,
    Item,
    Location,
    build_source,
    is_file_of,
    read_file,
)
from pipeline.images.sources.remote import LISTED_AT_ONCE, RemotePath, Stamp, is_url, locate_all
from pipeline.tables import ENDINGS, MESSAGE_LENGTH, SPLIT_WORDS, read_chunks, row_number

COLUMNS = ("path", "label", "split", "group")
"""The columns that are read. Only the first is required; all others are ignored."""

SYNONYMS = {
    "label": ("class", "target", "category", "labels", "class_name"),
    "split": ("subset", "set", "fold", "partition", "splits"),
}
"""Columns that are named to the user where the one that would be read is missing."""


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
    if not is_file_of(path, ENDINGS):
        return None
    if isinstance(path, RemotePath):
        path.hold = True
    header: list[str] = []

    def choose(names: Sequence[str]) -> list[str]:
        header[:] = names
        return list(_columns(path, names).values())

    def chunks() -> Iterator[dict[str, list[str]]]:
        for chunk in read_chunks(path, choose):
            yield {meaning: chunk[name] for meaning, name in _columns(path, header).items()}

    folder = path.parent
    elsewhere: list[str] = []
    located: dict[str, Location] = {}
    try:
        source = build_source(
            f"{folder.name}-{path.stem}",
            path.as_posix(),
            _labelled(path, chunks(), elsewhere),
            lambda item: read_file(located.get(item.uri) or folder / item.uri),
        )
        _check_unique(path, chunks, source.items.rows.uris)
    except TableError as error:
        raise SourceError(str(error)) from error
    if not source.items:
        raise SourceError(f"{path}: expected at least one row below the header, found none")
    located |= _located(folder, elsewhere)
    stamps, local = _stamped(located), str(folder) if isinstance(folder, Path) else ""
    # paths may be absolute
    source.items.set_stamps(lambda uri: stamps[uri] if uri in stamps else _stamp(posixpath.join(local, uri)))
    remote = {uri: image for uri, image in located.items() if isinstance(image, RemotePath)}
    web = {uri for uri, image in remote.items() if image.is_http}
    remarks = [*synonyms_beside(path, header), *unnoticed(item for item in source.items if item.uri in web)]
    return replace(source, remarks=(*source.remarks, *remarks), remote=bool(remote))


def columns_by_meaning(path: Location, header: Iterable[str]) -> dict[str, str]:
    """Return the columns that are read, as the file writes them, by their names in `COLUMNS`.

    Raises `SourceError` if there are two of one name.
    """
    found = [(name.strip().lower(), name) for name in header if name.strip().lower() in COLUMNS]
    for name, count in Counter(name for name, _ in found).items():
        if count > 1:
            raise SourceError(f"{path}: expected one column {name!r}, found {count}")
    return dict(found)


def _columns(path: Location, header: Sequence[str]) -> dict[str, str]:
    """Return `columns_by_meaning`, of which one must be the path."""
    found = columns_by_meaning(path, header)
    if "path" not in found:
        raise SourceError(f"{path}: expected a column 'path', found {shorten(', '.join(header), MESSAGE_LENGTH)}")
    return found


def synonyms_beside(path: Location, header: Iterable[str]) -> Iterator[str]:
    """Name the columns of `header` that may hold what a missing column would."""
    names = [name.strip().lower() for name in header]
    for column, synonyms in SYNONYMS.items():
        found = [name for name in names if name in synonyms]
        if column not in names and found:
            yield f"{path.name} has no column '{column}' but '{found[0]}', which is not read: rename it if it fits"


def _uri_of(cell: str) -> str:
    return cell if is_url(cell) else posixpath.normpath(cell)


def _check_unique(path: Location, chunks: Callable[[], Iterable[Mapping[str, list[str]]]], uris: Any) -> None:
    """Raise `SourceError` if two of the sorted `uris` are the same; it names their rows, for which it reads again."""
    repeated = np.flatnonzero(uris[1:] == uris[:-1])
    if len(repeated):
        uri, cells = uris[repeated[0]], chain.from_iterable(chunk["path"] for chunk in chunks())
        rows = [row_number(path, index) for index, cell in enumerate(cells) if _uri_of(cell) == uri]
        numbers = " and ".join(map(str, rows[:2]))
        raise SourceError(f"{path}: expected each path once, found {uri!r} in rows {numbers}")


def _labelled(
    path: Location, chunks: Iterable[Mapping[str, list[str]]], elsewhere: list[str]
) -> Iterator[tuple[Item, str]]:
    """Yield the images of a table, whose columns have their meanings as names, with the names of their classes.

    They have no stamps yet, so that faults of the table are told before the images are looked at. The uris of those
    that a URL names, or that lie beside a remote table, are added to `elsewhere`.

    Raises
    ------
    SourceError
        A row has no path or no valid split, or a remote table names an image elsewhere than on servers.
    """
    may_name = path.may_name if isinstance(path, RemotePath) else None
    index = 0
    for columns in chunks:
        for row in zip(*columns.values(), strict=True):
            number, cells = row_number(path, index), dict(zip(columns, row, strict=True))
            index += 1
            if not cells["path"]:
                raise SourceError(f"{path}: expected a path in row {number}, found none")
            uri = _uri_of(cells["path"])
            if may_name is not None and not may_name(uri):
                raise SourceError(
                    f"{path}: expected a path relative to the manifest or a URL in row {number}, found {uri!r}"
                )
            if may_name is not None or is_url(uri):
                elsewhere.append(uri)
            split = split_of(path, number, cells.get("split", ""))
            yield Item(uri, -1, split, cells.get("group", "")), cells.get("label", "")


def split_of(path: Location, number: int, word: str) -> str:
    """Return the split that a table's row names, ``""`` for none; raises `SourceError` if it is not known."""
    if word and word.lower() not in SPLIT_WORDS:
        hint = nearest(word.lower(), SPLIT_WORDS)
        raise SourceError(f"{path}: expected split train, val, test or none in row {number}, found {word!r}{hint}")
    return SPLIT_WORDS[word.lower()] if word else ""


def _located(folder: Location, uris: Sequence[str]) -> dict[str, Location]:
    """Return where images are that URLs name, or that lie beside a remote table."""
    found: dict[str, Location] = {uri: folder / uri for uri in uris if not is_url(uri)}
    urls = [uri for uri in uris if is_url(uri)]
    return found | dict(zip(urls, locate_all(urls), strict=True))


def _stamped(images: Mapping[str, Location]) -> dict[str, Stamp]:
    """Return what tells whether images change, by listing the folders that remote ones are in, never one by one.

    Web servers are not asked: they tell nothing.
    """
    folders: dict[Hashable, RemotePath] = {}
    for image in images.values():
        if isinstance(image, RemotePath) and not image.is_http:
            folders.setdefault(image.parent.key, image.parent)
    for fs in {id(folder.fs): folder.fs for folder in folders.values()}.values():
        fs.invalidate_cache()  # of an earlier call in this process
    listings = map_ahead(RemotePath.listing, folders.values(), LISTED_AT_ONCE, LISTED_AT_ONCE)
    listed = {file.key: file.stat() for listing in listings for file in listing.values()}
    return {
        uri: listed.get(image.key, Stamp()) if isinstance(image, RemotePath) else _stamp(str(image))
        for uri, image in images.items()
    }


def _stamp(path: str) -> Stamp:
    try:
        status = os.stat(path)  # noqa: PTH116 (a Path for each image takes longer than the call)
        return Stamp(status.st_size, status.st_mtime_ns)
    except (OSError, ValueError):  # reading it will tell why
        return Stamp()
