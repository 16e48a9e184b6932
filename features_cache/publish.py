"""Give finished files their names: by hard links, or by conditional uploads if the folder copies an object store."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Protocol


class ObjectStore(Protocol):
    """The store that a folder is a copy of; what it does may raise any `ThawlineError`."""

    def etag_of(self, path: Path) -> str | None:
        """Return the ETag of the object that `path` is a copy of; None if it is none, or was changed since."""

    def put(self, draft: Path, path: Path, replaced: str | None) -> bool:
        """Upload `draft` as the object of `path`, and rename it to `path`, if the object has the ETag `replaced`.

        None stands for no object. Else fetch what the store holds as `path`, keep `draft`, and return False.
        """

    def fetch(self, only: Collection[str] | None = None, *, anew: bool = False) -> bool:
        """Bring the copy up to date, and return whether the store holds any cache file.

        Parameters
        ----------
        only : collection of str, optional
            Names of the files to fetch, by default all.
        anew : bool, default False
            Fetch files, too, of which the copy has the present version.
        """

    def delete(self, path: Path) -> None:
        """Delete the object of `path`, if it has one; the copy stays. Raise if the object is no longer that one."""


_stores: dict[Path, ObjectStore] = {}


def register_store(folder: Path, store: ObjectStore) -> None:
    """Let this process publish what it makes in `folder` in a store, too."""
    _stores[folder] = store


def store_of(folder: Path) -> ObjectStore | None:
    """Return the store that a folder is a copy of; None for a folder of its own."""
    return _stores.get(folder)


def etag_of(path: Path) -> str | None:
    """Return the ETag of the object that a file is a copy of; None if there is none.

    Ask before the file is read: only then does a later `ObjectStore.put` replace nothing but what was read.
    """
    store = store_of(path.parent)
    return None if store is None else store.etag_of(path)


def link_new(draft: Path, path: Path) -> bool:
    """Give the file `draft` the name `path` too, unless there is a file of that name; return whether it was done."""
    if (store := store_of(path.parent)) is not None:
        return not path.exists() and store.put(draft, path, None)
    try:
        os.link(draft, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        if path.exists():
            return False
        draft.replace(path)
    return True
