"""Give finished files their names: by hard links, or by conditional uploads if the folder copies an object store."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Protocol


class ObjectStore(Protocol):
    """The store that a folder is a copy of; what it does may raise any `ThawlineError`."""

    def put(self, draft: Path, path: Path) -> bool:
        """Upload `draft` as the object of `path`, and rename it to `path`, if the store holds what the copy holds.

        That is the object that `path` was copied from, or none if there is no `path`. Else fetch what the store holds
        as `path`, keep `draft`, and return False.
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
        """Delete the object of `path`, if it has one; the copy stays."""


_stores: dict[Path, ObjectStore] = {}


def register_store(folder: Path, store: ObjectStore) -> None:
    """Let this process publish what it makes in `folder` in a store, too."""
    _stores[folder] = store


def store_of(folder: Path) -> ObjectStore | None:
    """Return the store that a folder is a copy of; None for a folder of its own."""
    return _stores.get(folder)


def link_new(draft: Path, path: Path) -> bool:
    """Give the file `draft` the name `path` too, unless there is a file of that name; return whether it was done."""
    if (store := store_of(path.parent)) is not None:
        return not path.exists() and store.put(draft, path)
    try:
        os.link(draft, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        if path.exists():
            return False
        draft.replace(path)
    return True
