"""Publish a part exactly once, however many processes compute it: no locks, which some shared file systems lack.

Every process writes a file of its own, ``PART.h5.try-UUID``. It begins with all sound rows of the published part and
of the tries of others, of which some may have been killed. When it is complete, it gets the part's name by `os.link`,
which only one process can do (in an object store, by a conditional upload, see `features_cache.publish`); then all
tries are deleted, whose writers stop at their next commit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from features_cache.errors import CacheError, explained
from features_cache.grow import carry_rows, match_rows, set_aside
from features_cache.layout import PENDING, Rows
from features_cache.lock import locking, temporary_path
from features_cache.parts import PartPlan, is_try, new_try, published_path
from features_cache.prune import drop_redundant
from features_cache.publish import link_new, store_of
from features_cache.reader import open_cache
from features_cache.rowfile import sync_folder
from features_cache.writer import CacheWriter


def tries_of(path: Path) -> list[Path]:
    """Return the tries at a part, with their locks and temporary files."""
    return sorted(other for other in path.parent.iterdir() if is_try(other) and published_path(other) == path)


def drop_tries(path: Path) -> None:
    """Delete all tries at a part; their writers stop at their next commit."""
    with explained(path, "write"):
        for each in tries_of(path):
            each.unlink(missing_ok=True)


def begin_try(
    plan: PartPlan,
    number: int,
    rows: Rows,
    classes: tuple[str, ...],
    *,
    donors: Iterable[Path] = (),
    carry: NDArray[np.bool_] | None = None,
    digests: NDArray[np.uint8] | None = None,
) -> CacheWriter:
    """Create a file for a part under a name of its own, with all rows that others hold, and open it for writing.

    Parameters
    ----------
    plan : PartPlan
    number : int
        Of the part.
    rows, classes
        As for `CacheWriter.create`.
    donors : iterable of Path
        Files whose sound rows are carried over, if they hold the same layers; files that do not open are passed over.
    carry : ndarray of bool, shape (n,), optional
        Which rows may be carried over, by default all.
    digests : ndarray of uint8, shape (n, 16), optional
        As for `features_cache.grow.match_rows`.

    Raises
    ------
    CacheError
        The folder cannot be written, or another process published the part meanwhile.
    """
    from features_cache.create import build_file  # h5py

    draft = new_try(plan.path_of(number))
    with locking(draft) as lock:
        temporary = temporary_path(draft)
        build_file(temporary, rows, classes, plan.layers, {**plan.handles, "part": str(number)}, plan.request)
        for donor in donors:
            try:
                old = open_cache(donor)
                if old.layers != {layer.name: layer for layer in plan.layers}:
                    continue
                new_rows, old_rows = match_rows(old, rows, digests)
                left = open_cache(temporary).states[new_rows] == PENDING
                if carry is not None:
                    left &= carry[new_rows]
                carry_rows(old, temporary, new_rows[left], old_rows[left])
            except CacheError:
                if not temporary.exists():
                    raise
        with explained(draft, "write"):
            temporary.replace(draft)
            sync_folder(draft.parent)
        return CacheWriter(draft, lock)


def publish_try(draft: Path, is_complete: Callable[[], bool], replaced: str | None = None) -> bool:
    """Give a finished try the name of its part, unless another process did, and delete all tries.

    A published file that is not complete (the source changed, or rows were damaged) is superseded; in an object store
    it is replaced.

    Parameters
    ----------
    draft : Path
        The try; its writer is closed.
    is_complete : callable
        Tells whether the published file is what the try would be.
    replaced : str, optional
        What `features_cache.publish.etag_of` told of the part before the try began; by default, there was no part.

    Returns
    -------
    bool
        False if the part in an object store has changed since the try began and is not complete either: begin another
        try, which carries the rows of both.
    """
    path = published_path(draft)
    store = store_of(path.parent)
    with explained(path, "write"):
        if store is not None:
            if not store.put(draft, path, replaced) and not is_complete():
                return False
        elif not link_new(draft, path) and not is_complete():
            set_aside(path)
            draft.replace(path)
        sync_folder(path.parent)
    drop_tries(path)
    drop_redundant(path)
    return True
