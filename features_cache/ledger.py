"""Commit rows so that kills are harmless: write values, sync, write states, sync."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features_cache.checksums import crc_rows
from features_cache.errors import explained
from features_cache.layout import PENDING, RECORD
from features_cache.reader import CacheFile
from features_cache.rowfile import RowFile

COMMIT_SECONDS = 1.0
COMMIT_SHARE = 0.01
"""Commits come at most every `COMMIT_SECONDS`, on a slow disk less often, so that they take this share of the time."""
HELD_BYTES = 8 << 20
"""Bytes of features that are gathered in memory before a write: many small writes cost three times as much."""


class Ledger:
    """Collects finished rows of one file and commits them.

    Parameters
    ----------
    cache : CacheFile
        The file; the caller holds its lock.

    Attributes
    ----------
    states : ndarray of uint8, shape (n_rows,)
        States including uncommitted ones.
    """

    def __init__(self, cache: CacheFile) -> None:
        self._path = cache.path
        self._arrays = cache.header.arrays
        self._layers = tuple(cache.layers)
        self.states = np.array(cache.states)
        self._held: list[tuple[NDArray[np.int64], dict[str, NDArray[Any]]]] = []
        self._held_bytes = 0
        self._unsynced: list[tuple[NDArray[np.int64], NDArray[np.void]]] = []
        self._due = time.monotonic() + COMMIT_SECONDS
        with explained(cache.path, "write"):
            self._file = RowFile(cache.path)

    @property
    def due(self) -> bool:
        """Whether it is time to commit."""
        return time.monotonic() >= self._due

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._file.closed

    def put(
        self, rows: NDArray[np.int64], stored: Mapping[str, NDArray[Any]], found: NDArray[np.void], state: int
    ) -> None:
        """Take rows that get `state` with the next commit.

        Parameters
        ----------
        rows : ndarray of int64, shape (k,)
            Pending rows.
        stored : mapping of str to ndarray, shape (k, dim)
            Per layer, in the stored dtype.
        found : structured ndarray of `layout.RECORD`, shape (k,)
            Their reading results.
        state : int
            ``DONE`` or ``UNREADABLE``.
        """
        self._held.append((rows, {name: values.copy() for name, values in stored.items()}))
        self._unsynced.append((rows, found))
        self.states[rows] = state
        self._held_bytes += sum(values.nbytes for values in stored.values())
        if self._held_bytes >= HELD_BYTES:
            self._flush()

    def get(self, name: str, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Return stored rows of an array, uncommitted ones included; shape (k, ...)."""
        self._flush()
        with explained(self._path, "read"):
            return self._file.get(self._arrays[name], rows)

    def put_now(self, name: str, rows: NDArray[np.int64], values: NDArray[Any]) -> None:
        """Write and sync rows of any array."""
        with explained(self._path, "write"):
            self._file.put(self._arrays[name], rows, values)
            self._file.sync()

    def reopen(self, rows: NDArray[np.int64]) -> None:
        """Mark finished rows pending at once, so that they can be written again."""
        self.put_now("/rows/state", rows, np.full(len(rows), PENDING, np.uint8))
        self.states[rows] = PENDING

    def commit(self) -> None:
        """Sync all rows that were put, then write and sync their states.

        It may be interrupted anywhere and called again: rows are forgotten only after the last sync.

        Raises
        ------
        CacheError
            The disk refuses, or the file was removed or replaced.
        """
        if not self._unsynced:
            return
        started = time.monotonic()
        self._flush()
        rows = np.concatenate([rows for rows, _ in self._unsynced])
        order = np.argsort(rows)
        rows, found = rows[order], np.concatenate([found for _, found in self._unsynced])[order]
        with explained(self._path, "write"):
            self._file.check_still_there()
            for field in RECORD.names or ():
                self._file.put(self._arrays[f"/rows/{field}"], rows, found[field])
            self._file.put(self._arrays["/rows/result_crc"], rows, crc_rows(found))
            self._file.sync()
            self._file.put(self._arrays["/rows/state"], rows, self.states[rows])
            self._file.sync()
        self._unsynced.clear()
        ended = time.monotonic()
        self._due = ended + max(COMMIT_SECONDS, (ended - started) / COMMIT_SHARE)

    def _flush(self) -> None:
        with explained(self._path, "write"):
            for name in self._layers:
                parts = [(rows, stored[name]) for rows, stored in self._held if name in stored]
                if parts:
                    rows, values = np.concatenate([x for x, _ in parts]), np.concatenate([x for _, x in parts])
                    self._file.put(self._arrays[f"/features/{name}"], rows, values)
                    self._file.put(self._arrays[f"/crc/{name}"], rows, crc_rows(values))
        self._held.clear()
        self._held_bytes = 0

    def close(self) -> None:
        """Close the file without committing."""
        self._file.close()
