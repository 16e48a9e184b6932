"""Folders of images: one walk lists the files, and their paths alone say what is a split and what is a class."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from stat import S_ISREG
from typing import Any

import numpy as np

from features_cache import TEXT
from pipeline.errors import SourceError
from pipeline.images.sources.items import (
    IMAGE_EXTENSIONS,
    ImageSource,
    Item,
    Items,
    Location,
    build_source,
    extension_of,
    is_image_file,
    read_file,
    sort_source,
    stamp,
)
from pipeline.images.sources.remote import RemotePath
from pipeline.tables import SPLIT_WORDS


def open_folder(path: Location) -> ImageSource | None:
    """Return the images under a folder, labelled by its class folders if it has any; None if `path` is no folder."""
    if not path.is_dir():
        return None
    passed_over: Counter[str] = Counter()
    items, names = _split_and_named(Items.of(walk(path, is_image_file, passed_over), path.as_posix()), path)
    listed = path.files if isinstance(path, RemotePath) else None
    source = sort_source(
        path.name or "root",
        path.as_posix(),
        items,
        names,
        lambda item: read_file(path / item.uri if listed is None else listed[item.uri]),
    )
    is_web = isinstance(path, RemotePath) and path.is_http
    remarks = *source.remarks, *unnoticed(source.items if is_web else ())
    return replace(source, passed_over=dict(passed_over), remarks=remarks, remote=isinstance(path, RemotePath))


def _split_and_named(items: Items, root: Location) -> tuple[Items, list[str]]:
    """Return items with the splits and labels that their paths imply, and the names that the labels stand for."""
    numbers: dict[tuple[str, str], int] = {}  # of pairs of split and class, which are few
    found = splits_and_classes(items.rows.uris, root)
    labels = np.fromiter((numbers.setdefault(pair, len(numbers)) for pair in found), np.int64, len(items))
    splits: Any = items.rows.splits  # all empty, for which they take no memory
    if any(split for split, _ in numbers):
        splits = np.array([split for split, _ in numbers], TEXT)[labels]
    return Items(replace(items.rows, labels=labels, splits=splits)), [name for _, name in numbers]


def open_image(path: Location) -> ImageSource | None:
    """Return one image, without a label; None if `path` is no image file."""
    if not path.is_file() or not is_image_file(path, extension_of(path.name)):
        return None
    size, mtime_ns = stamp(path)
    item = Item(path.name, size=size, mtime_ns=mtime_ns)
    source = build_source(path.stem, path.as_posix(), [(item, "")], lambda item: read_file(path))
    if not isinstance(path, RemotePath):
        return source
    remarks = *source.remarks, *unnoticed(source.items if path.is_http else ())
    return replace(source, remarks=remarks, remote=True)


def unnoticed(items: Iterable[Item]) -> Iterator[str]:
    """Say that changes of images on web servers are not noticed, for those of which no version is known."""
    if count := sum(not item.mtime_ns for item in items):
        yield (
            f"{count} images are on web servers that tell no versions: whether they changed since an earlier "
            "extraction is noticed only if it rehashes"
        )


def splits_and_classes(uris: Collection[str], root: Location) -> Iterator[tuple[str, str]]:
    """Return an iterator of the split and the class name that each path implies, ``""`` for none.

    A path is ``[SPLIT/][CLASS/…/]FILE``. Folders that have a split's name are splits, unless they have other folders
    beside them and hold images directly: then they are classes (a `train` beside a `bus`). Images beside class folders
    have no class, and a folder without images is no class.

    Raises
    ------
    SourceError
        Split folders that contain class folders have other folders beside them.
    """
    below = {(top, "/" in rest) for top, slash, rest in (uri.partition("/") for uri in uris) if slash}
    tops = {top for top, _ in below}
    splits = {top for top in tops if top.lower() in SPLIT_WORDS}
    if splits != tops and splits:
        if any(top in splits and has_folders for top, has_folders in below):
            raise SourceError(
                f"{root}: expected split folders alone or class folders alone, found split {', '.join(sorted(splits))} "
                f"beside {', '.join(sorted(tops - splits)[:5])}: move or rename one kind"
            )
        splits = set()

    def split_and_class(uri: str) -> tuple[str, str]:
        top, slash, rest = uri.partition("/")
        split = SPLIT_WORDS[top.lower()] if slash and top in splits else ""
        name, slash, _ = (rest if split else uri).partition("/")
        return split, name if slash else ""

    return map(split_and_class, uris)


def walk(root: Location, is_wanted: Callable[[Location, str], bool], passed_over: Counter[str]) -> Iterator[Item]:
    """Yield the files under `root` that `is_wanted` takes, in no order, without split or class.

    It is called with the path of each regular file and its extension in lower case. The extensions of other files are
    counted in `passed_over`.

    Hidden names are left out. Links to files and folders are followed, but a link to a folder that contains it is not.
    A link that leads nowhere and has an image's extension is kept as a missing file, which cannot be read later.

    Raises
    ------
    SourceError
        A folder cannot be listed.
    """
    for item, path in _remote_files(root) if isinstance(root, RemotePath) else _files(root):
        extension = extension_of(item.uri.rpartition("/")[2])
        if is_wanted(path, extension) if path is not None else extension in IMAGE_EXTENSIONS:
            yield item
        else:
            passed_over[extension] += 1


def _remote_files(root: RemotePath) -> Iterator[tuple[Item, RemotePath]]:
    for uri, path in root.files.items():
        size, mtime_ns = path.stat()
        yield Item(uri, size=size, mtime_ns=mtime_ns), path


def _files(root: Path) -> Iterator[tuple[Item, Path | None]]:
    """Yield the regular files under `root` with their paths, and without paths the links that lead nowhere."""
    for uri, entry in _entries(root):
        try:
            status = entry.stat()
        except OSError:
            yield Item(uri), None
        else:
            if S_ISREG(status.st_mode):
                yield Item(uri, size=status.st_size, mtime_ns=status.st_mtime_ns), root / uri


def _entries(root: Path) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield all that is no folder under `root`, with its path relative to `root`."""
    above = frozenset(_identity(folder) for folder in (root, *root.resolve().parents))
    pending = [("", root, above)]
    while pending:
        prefix, folder, ancestors = pending.pop()
        for entry in _listing(folder):
            if entry.name.startswith("."):
                continue
            if not _is_folder(entry):
                yield prefix + entry.name, entry
            elif (identity := _identity(Path(entry.path))) not in ancestors:
                pending.append((f"{prefix}{entry.name}/", Path(entry.path), ancestors | {identity}))


def _listing(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:  # one system call a file where pathlib makes several
            yield from entries
    except OSError as error:
        raise SourceError(f"{folder}: expected a folder that can be listed: {error.strerror}") from None


def _identity(folder: Path) -> tuple[int, int]:
    try:
        status = folder.stat()  # a DirEntry's own stat has no inode on Windows
    except OSError as error:
        raise SourceError(f"{folder}: expected a folder that can be listed: {error.strerror}") from None
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: not a folder, so an image that cannot be read
        return False
