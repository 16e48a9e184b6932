"""List and delete superseded files, and temporary files that a kill left behind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from features_cache.catalog import is_superseded, superseded_files
from features_cache.checksums import sound_results
from features_cache.convert import digest_keys
from features_cache.errors import CacheError, explained
from features_cache.layout import DONE
from features_cache.lock import WriterLock
from features_cache.parts import is_try, open_plan, plan_of, published_path
from features_cache.publish import store_of
from features_cache.reader import CacheFile, open_cache
from features_cache.rowfile import sync_folder


def superseded(folder: str | Path) -> list[Path]:
    """Return the files in a folder that `prune` may delete, sorted: superseded files and what kills left behind.

    A superseded file may hold rows that its successor lacks, of images that were removed or renamed. Extraction reuses
    such rows as long as the file exists. Kills leave temporary files, and tries at parts that are published by now. A
    plan may no longer name a part whose images are all gone.

    Raises
    ------
    CacheError
        `folder` is not a folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CacheError(f"{folder} is not a folder; name the folder that holds the cache files")
    return sorted(path for path in folder.glob("*.h5*") if _may_go(path))


def _may_go(path: Path) -> bool:
    if is_superseded(path) or path.name.endswith(".h5.tmp"):
        return True
    part = published_path(path)
    plan = plan_of(part)
    try:
        return plan is not None and (part.exists() if is_try(path) else part not in open_plan(plan).paths)
    except CacheError:  # without its plan, a part stays
        return False


def prune(paths: Sequence[Path]) -> int:
    """Delete files that `superseded` listed; return the number of freed bytes.

    In an object store, the plans are read again, and only objects that are the listed ones are deleted.

    Raises
    ------
    CacheLockedError
        A file is being written; the files before it in the list are deleted.
    CacheError
        A file may not be deleted (then none is), or the folder cannot be written.
    """
    for folder in {path.parent for path in paths}:
        if (store := store_of(folder)) is not None:
            store.fetch([plan.name for path in paths if (plan := plan_of(published_path(path))) is not None])
    for path in paths:
        if not _may_go(path):
            raise CacheError(f"{path.name} is not a superseded file, or no longer one; list again what can be pruned")
    freed = 0
    for path in paths:
        lock = WriterLock(path.with_suffix("")) if path.suffix == ".tmp" else None
        try:
            with explained(path, "delete"):
                status = path.stat()
                if (store := store_of(path.parent)) is not None:
                    store.delete(path)
                path.unlink()
        finally:
            if lock is not None:
                lock.release()
        freed += status.st_size if status.st_nlink == 1 else 0
    return freed


def drop_redundant(path: str | Path) -> list[Path]:
    """Delete the superseded versions of a file that hold no image which the file lacks; return the deleted paths.

    Images are compared by digest. Damaged versions stay until the user prunes them.

    Parameters
    ----------
    path : str or Path
        The new file.
    """
    path = Path(path)
    candidates = superseded_files(path).values()
    if not candidates:
        return []
    have = _done_digests(open_cache(path))
    dropped = []
    for candidate in candidates:
        try:
            redundant = np.isin(_done_digests(open_cache(candidate)), have).all()
        except CacheError:
            continue  # damaged, but only the user may delete it
        if redundant:
            with explained(candidate, "delete"):
                candidate.unlink()
            dropped.append(candidate)
    if dropped:
        sync_folder(path.parent)
    return dropped


def _done_digests(cache: CacheFile) -> NDArray[np.bytes_]:
    rows = np.flatnonzero(cache.states == DONE)
    return digest_keys(cache.digests[rows[sound_results(cache, rows)]])
