"""Folders of images: walk them once, then let the paths alone say what is a split and what a class."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from stat import S_ISREG
from typing import NamedTuple

from pipeline.errors import SourceError
from pipeline.images.sources.items import (
    IMAGE_SUFFIXES,
    MISSING_SIZE,
    Entry,
    ImageSource,
    Item,
    build_source,
    read_file,
)

SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
"""What folders, manifests and shard names may call a split, in lower case, and what it is called here."""


class Found(NamedTuple):
    """A file as the walk saw it: POSIX path relative to the root, bytes, modification time in nanoseconds."""

    uri: str
    size: int
    mtime_ns: int


class FileReader:
    """Reads items whose uri is a path relative to `root`, or an absolute one."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __call__(self, item: Item) -> bytes:
        """Return the file's bytes; see `read_file` for what it raises."""
        return read_file(self.root / item.uri)


def open_folder(root: Path, files: Iterable[Found]) -> ImageSource:
    """Return the images of a folder, labelled by its class folders where it has any.

    Parameters
    ----------
    root : Path
        Absolute.
    files : iterable of Found
        The images that `walk` found under `root`.
    """
    files = list(files)
    places = place([found.uri for found in files], root)
    entries = [
        Entry(found.uri, label, split, "", found.size, found.mtime_ns)
        for found, (split, label) in zip(files, places, strict=True)
    ]
    return build_source(root.name or "root", root.as_posix(), entries, FileReader(root))


def place(uris: list[str], root: Path) -> list[tuple[str, str]]:
    """Return the split and the class name that each path implies, ``""`` for none.

    A path is ``[SPLIT/][CLASS/…/]FILE``. Folders called by a split's name are splits, unless they stand among others
    and hold images directly: then they are classes (a `train` beside a `bus`). Images beside class folders have no
    class, and a folder without images is none.

    Raises
    ------
    SourceError
        Split folders with class folders inside stand beside other folders.
    """
    parts = [uri.split("/") for uri in uris]
    tops = {path[0] for path in parts if len(path) > 1}
    splits = {top for top in tops if top.lower() in SPLIT_WORDS}
    if splits != tops and splits:
        if any(path[0] in splits and len(path) > 2 for path in parts):
            raise SourceError(
                f"{root}: expected split folders alone or class folders alone, found split {', '.join(sorted(splits))} "
                f"beside {', '.join(sorted(tops - splits)[:5])}: move or rename one kind"
            )
        splits = set()
    placed = []
    for path in parts:
        split = SPLIT_WORDS[path[0].lower()] if path[0] in splits and len(path) > 1 else ""
        below = path[1:] if split else path
        placed.append((split, below[0] if len(below) > 1 else ""))
    return placed


def suffix_of(name: str) -> str:
    """Return a file name's ending with its dot, in lower case; pathlib's takes longer than the walk."""
    return name[name.rfind(".") :].lower()


def walk(root: Path, suffixes: frozenset[str] = IMAGE_SUFFIXES) -> Iterator[Found]:
    """Yield the files under `root` with one of `suffixes`, in no order; hidden names are passed over.

    Links are followed, to files and to folders; a folder that is its own ancestor, by way of a link, is not entered
    again. A link that leads nowhere is kept (size -1): reading it will tell.

    Raises
    ------
    SourceError
        A folder cannot be listed.
    """
    above = frozenset(_identity(folder) for folder in (root, *root.resolve().parents))
    pending = [("", root, above)]
    while pending:
        prefix, folder, ancestors = pending.pop()
        for entry in _listing(folder):
            name = entry.name
            if name.startswith("."):
                continue
            if _is_folder(entry):
                identity = _identity(Path(entry.path))
                if identity not in ancestors:
                    pending.append((f"{prefix}{name}/", Path(entry.path), ancestors | {identity}))
            elif suffix_of(name) in suffixes:
                yield from _found(entry, prefix + name)


def _listing(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:  # one system call a file where pathlib makes several
            return list(entries)
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
    except OSError:  # a link to itself is no folder; as a file it is an unreadable image
        return False


def _found(entry: os.DirEntry[str], uri: str) -> Iterator[Found]:
    try:
        status = entry.stat()
    except OSError:
        yield Found(uri, MISSING_SIZE, 0)
        return
    if S_ISREG(status.st_mode):
        yield Found(uri, status.st_size, status.st_mtime_ns)
