"""Read, write and sync raw rows of a file at known offsets."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from features_cache.errors import CacheError
from features_cache.layout import ArrayInfo

_sync = getattr(os, "fdatasync", os.fsync)


class RowFile:
    """An open file whose arrays are read and written by row.

    Parameters
    ----------
    path : Path
        An existing file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("r+b", buffering=0)
        self.descriptor = self._file.fileno()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._file.closed

    def put(self, array: ArrayInfo, rows: NDArray[np.int64], values: NDArray[Any]) -> None:
        """Write ``values[i]`` as row ``rows[i]``; adjacent rows are written in one call."""
        width = array.row_bytes
        for part in stretches(rows):
            self.write(array.offset + int(rows[part.start]) * width, values[part])

    def get(self, array: ArrayInfo, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Return stored rows, shape (k, ...)."""
        width = array.row_bytes
        out = np.empty((len(rows), *array.shape[1:]), array.dtype)
        for part in stretches(rows):
            rest, offset = out[part].reshape(-1).view(np.uint8).data, array.offset + int(rows[part.start]) * width
            while rest:
                count = os.preadv(self.descriptor, [rest], offset)
                if count == 0:
                    raise CacheError(f"{self.path} was cut short while it was open; extract again")
                rest, offset = rest[count:], offset + count
        return out

    def write(self, offset: int, values: NDArray[Any]) -> None:
        """Write the bytes of `values`, in C order, at `offset`."""
        rest = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
        while rest:
            written = os.pwrite(self.descriptor, rest, offset)
            rest, offset = rest[written:], offset + written

    def sync(self) -> None:
        """Wait until all written bytes are on disk."""
        _sync(self.descriptor)

    def check_still_there(self) -> None:
        """Raise `CacheError` if the path no longer names this file, since writes to it would be lost."""
        try:
            there = self.path.stat().st_ino == os.fstat(self.descriptor).st_ino
        except FileNotFoundError:
            there = False
        if not there:
            raise CacheError(f"{self.path} was removed or replaced while it was written; run the command again")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def stretches(rows: NDArray[np.int64]) -> Iterator[slice]:
    """Yield slices of `rows` that hold consecutive row numbers."""
    breaks = np.flatnonzero(rows[1:] - rows[:-1] != 1) + 1
    for start, stop in pairwise([0, *breaks.tolist(), len(rows)]):
        if stop > start:
            yield slice(start, stop)


def open_own(path: Path, flags: int) -> int:
    """Open or create a file that only thawline writes, and return its descriptor; links are not followed.

    A folder from somebody else may hold a link under the name of such a file, and writing through it would change any
    file of the user.

    Parameters
    ----------
    path : Path
    flags : int
        Such as ``os.O_RDWR``; ``os.O_EXCL`` refuses an existing file.

    Raises
    ------
    CacheError
        There is a symbolic link, a file with a second name, or something else than a file.
    OSError
        As `os.open`.
    """
    strange = CacheError(f"cannot write {path}: it is a link or no regular file; remove it, or put a copy in its place")
    try:
        descriptor = os.open(path, flags | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise strange from error
        raise
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(descriptor)
        raise strange
    return descriptor


def sync_folder(folder: Path) -> None:
    """Wait until the entries of `folder` are on disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
