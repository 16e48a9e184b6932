"""Write a cache file: features are synced before their rows are marked done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from features_cache.convert import records, stored_features
from features_cache.errors import CacheError, explained
from features_cache.layout import (
    DIGEST_BYTES,
    DONE,
    PENDING,
    RUN_BYTES,
    RUN_SLOTS,
    UNREADABLE,
    LayerInfo,
    Rows,
)
from features_cache.ledger import Ledger
from features_cache.lock import WriterLock, locking, temporary_path
from features_cache.reader import CacheFile, open_cache
from features_cache.rowfile import sync_folder
from features_cache.runs import encode_run


class CacheWriter:
    """The only writer of a cache file: a context manager that commits on exit, also after an exception.

    `create` and `resume` make it. About once a second, `commit` syncs the features written so far and then marks their
    rows done. A kill loses at most the rows since the last commit. Not thread-safe.

    Parameters
    ----------
    path : Path
        The file to write.
    lock : WriterLock
        The lock of the file's final name; `close` releases it.
    """

    def __init__(self, path: Path, lock: WriterLock) -> None:
        self._lock = lock
        self.cache: CacheFile = open_cache(path)
        self._ledger = Ledger(self.cache)
        again = np.flatnonzero(self.cache.pending & (self._ledger.states != PENDING))
        if len(again):
            self._ledger.reopen(again)
        self._run: dict[str, Any] = {"run": -1}
        self._computed = 0

    @classmethod
    def create(
        cls,
        path: str | Path,
        rows: Rows,
        classes: Sequence[str],
        layers: Sequence[LayerInfo],
        handles: Mapping[str, str],
        request: Mapping[str, Any],
    ) -> CacheWriter:
        """Create a file with all rows pending and all of its disk space reserved.

        Parameters
        ----------
        path : str or Path
            The file to create; missing folders are created too.
        rows : Rows
            The images of the source.
        classes : sequence of str
            Class names.
        layers : sequence of LayerInfo
            The layers to store.
        handles, request : mapping
            How users select the file, and the request it is made for; both JSON.

        Raises
        ------
        CacheError
            The file exists, the disk is too small, or the folder cannot be written.
        CacheLockedError
            Another process writes it.
        """
        from features_cache.create import build_file

        path = Path(path)
        with explained(path, "write"):
            path.parent.mkdir(parents=True, exist_ok=True)
        with locking(path) as lock:
            if path.exists():
                raise CacheError(f"{path} already exists; run the same command again, or choose another name")
            temporary = temporary_path(path)
            build_file(temporary, rows, classes, layers, handles, request)
            with explained(path, "write"):
                temporary.replace(path)
                sync_folder(path.parent)
            return cls(path, lock)

    @classmethod
    def resume(cls, path: str | Path) -> CacheWriter:
        """Open an existing file to add rows; raises as `create` and `open_cache` do."""
        path = Path(path)
        open_cache(path)  # a wrong path or a foreign file gets its own error, and no lock file
        with locking(path) as lock:
            return cls(path, lock)

    def begin_run(self, provenance: Mapping[str, Any]) -> None:
        """Record the provenance of the rows that are written from now on.

        Parameters
        ----------
        provenance : mapping
            JSON of at most about 4,000 bytes (longer texts are cut): versions, engine, device, command.
            ``"run"``, ``"started"``, and on close ``"ended"`` and ``"rows"`` are added.
        """
        known = [record["run"] for record in self.cache.runs]
        number = max([*known, int(self.cache.run_ids.max())]) + 1
        self._run = {**provenance, "run": number, "started": _now()}
        self._write_run()

    def pending(self) -> NDArray[np.int64]:
        """Return the numbers of all pending rows, ascending."""
        return np.flatnonzero(self._ledger.states == PENDING)

    def has(self, rows: ArrayLike) -> NDArray[np.bool_]:
        """Return for each of `rows` (k,) whether its features are written, committed or not."""
        return np.asarray(self._ledger.states[np.asarray(rows, np.int64)] == DONE, bool)

    def write(self, rows: ArrayLike, features: Mapping[str, NDArray[Any]], digests: ArrayLike) -> None:
        """Write the features of some pending rows.

        Parameters
        ----------
        rows : array_like of int, shape (k,)
            Row numbers without repetition.
        features : mapping of str to ndarray of float32, shape (k, dim)
            For every layer of the file.
        digests : array_like of uint8, shape (k, 16)
            blake2b-128 of the bytes that were decoded.

        Raises
        ------
        CacheError
            A value is too large for float16, a row is not pending, layers or shapes are wrong, or the disk cannot be
            written. Rows written before are kept.
        """
        rows = self._pending_rows(rows)
        if features.keys() != self.cache.layers.keys():
            raise CacheError(
                f"expected features of {', '.join(self.cache.layers)}, got {', '.join(features) or 'none'}"
            )
        stored = {name: stored_features(features[name], layer, len(rows)) for name, layer in self.cache.layers.items()}
        self._ledger.put(rows, stored, self._records(rows, digests), DONE)
        self._computed += len(rows)
        self._maybe_commit()

    def fail(self, row: int, reason: str, digest: bytes | NDArray[np.uint8] | None) -> None:
        """Mark one pending row unreadable.

        Parameters
        ----------
        row : int
            Row number.
        reason : str
            Short reason, kept with the row (80 bytes).
        digest : bytes or ndarray of uint8, shape (16,), or None
            Of the bytes that cannot be decoded; ``None`` if there were none, so that the next writer tries again.
        """
        rows = self._pending_rows([row])
        known = bytes(DIGEST_BYTES) if digest is None else digest
        found = self._records(rows, np.frombuffer(known, np.uint8)[None], reason.strip() or "unreadable")
        self._ledger.put(rows, {}, found, UNREADABLE)
        self._maybe_commit()

    def read(self, layer: str, rows: ArrayLike) -> NDArray[np.float32]:
        """Return features that were written, committed or not.

        Parameters
        ----------
        layer : str
            Name of a layer.
        rows : array_like of int, shape (k,)
            Rows that were written in this run or before.

        Returns
        -------
        ndarray of float32, shape (k, dim)
        """
        info = self.cache.layer(layer)
        rows = np.asarray(rows, np.int64)
        if (self._ledger.states[rows] != DONE).any():
            raise CacheError(f"row {rows[self._ledger.states[rows] != DONE][0]} has no features yet; write it first")
        return self._ledger.get(f"/features/{info.name}", rows).astype(np.float32, copy=False)

    def commit(self) -> None:
        """Sync all features written so far, then mark their rows done; on return, a power cut loses none of them.

        Raises
        ------
        CacheError
            The disk cannot be written, or the file was removed or replaced. The rows stay pending in the file.
        """
        self._ledger.commit()

    def close(self) -> None:
        """Commit, complete the record of the run, and release the lock."""
        if self._ledger.closed:
            return
        try:
            self.commit()
            if self._run["run"] >= 0:
                self._run |= {"ended": _now(), "rows": self._computed}
                self._write_run()
        finally:
            self._ledger.close()
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _pending_rows(self, rows: ArrayLike) -> NDArray[np.int64]:
        numbers = np.asarray(rows, np.int64).reshape(-1)
        if len(numbers) and not (numbers.min() >= 0 and numbers.max() < self.cache.n_rows):
            raise CacheError(f"a row number is out of range; expected 0 to {self.cache.n_rows - 1}")
        taken = self._ledger.states[numbers] != PENDING
        if taken.any() or len(set(numbers.tolist())) != len(numbers):
            raise CacheError(
                f"each pending row can be written once; {numbers[taken].tolist() or 'a row was given twice'}"
            )
        return numbers

    def _records(self, rows: NDArray[np.int64], digests: ArrayLike, reason: str = "") -> NDArray[np.void]:
        return records(digests, self.cache.sizes[rows], self.cache.mtimes_ns[rows], self._run["run"], reason)

    def _write_run(self) -> None:
        record = np.array([encode_run(self._run)], f"S{RUN_BYTES}")
        self._ledger.put_now("/runs", np.array([self._run["run"] % RUN_SLOTS]), record)

    def _maybe_commit(self) -> None:
        if self._ledger.due:
            self.commit()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
