"""One writer per cache file: an OS lock on a file beside it, which a kill releases."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from features_cache.errors import CacheError, CacheLockedError, explained
from features_cache.parts import is_try
from features_cache.publish import store_of
from features_cache.rowfile import open_own


class WriterLock:
    """The exclusive right to write `path`, until `release` or the end of the process.

    The lock file (``NAME.lock``) is removed on release. Another process may have opened it just before, so an acquired
    lock counts only if its file is still the one on disk.

    Parameters
    ----------
    path : Path
        The cache file; it need not exist, its folder must.

    Raises
    ------
    CacheLockedError
        Another process holds the lock; the message names it.
    CacheError
        The lock file cannot be created. Or the file is copied from an object store, where only whole files are written.
    """

    def __init__(self, path: Path) -> None:
        if store_of(path.parent) is not None and not is_try(path):
            raise CacheError(
                f"{path.name} is one file in an object store, where only caches in parts can be written; extract into "
                "another folder"
            )
        self._path = path.with_name(f"{path.name}.lock")
        with explained(path, "write"):
            while not self._acquire(path):
                pass

    def _acquire(self, path: Path) -> bool:
        self._fd = open_own(self._path, os.O_RDWR)
        held = False
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"process {os.getpid()}\n".encode(), 0)
            with suppress(FileNotFoundError):
                held = os.fstat(self._fd).st_ino == self._path.stat().st_ino
        except BlockingIOError:
            holder = os.pread(self._fd, 64, 0).decode(errors="replace").strip() or "another process"
            raise CacheLockedError(
                f"cannot write {path}: {holder} is writing it; wait for it to end, or choose another folder"
            ) from None
        finally:
            if not held:
                os.close(self._fd)
        return held

    def release(self) -> None:
        """Release the lock and remove its file."""
        self._path.unlink(missing_ok=True)
        os.close(self._fd)


def temporary_path(path: Path) -> Path:
    """Return the name under which a new `path` is built; the lock of `path` guards it."""
    return path.with_name(f"{path.name}.tmp")


@contextmanager
def locking(path: Path) -> Iterator[WriterLock]:
    """Lock `path`; if the block raises, remove the temporary file and release the lock, else the caller keeps it."""
    lock = WriterLock(path)
    try:
        yield lock
    except BaseException:
        temporary_path(path).unlink(missing_ok=True)
        lock.release()
        raise
