"""Open a cache file and read it in place: every column is a memory map."""

from __future__ import annotations

import mmap
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from features_cache.checksums import chunks, crc_rows, damaged_columns
from features_cache.convert import decoded_text
from features_cache.errors import CacheError, DamagedCacheError, explained, nearest
from features_cache.header import Header, read_header, read_line
from features_cache.layout import DONE, PENDING, SPLITS, UNREADABLE, LayerInfo
from features_cache.parts import PLAN_SUFFIX
from features_cache.runs import decode_runs


def open_cache(path: str | Path) -> CacheFile:
    """Open one cache file for reading, also while a writer is adding rows.

    Parameters
    ----------
    path : str or Path
        The file, or the plan of a cache in parts.

    Raises
    ------
    CacheError
        It does not exist or cannot be read.
    DamagedCacheError
        It is not a cache of this version, or its structure is damaged. libhdf5 never opens such a file.
    """
    path = Path(path)
    if path.suffix == PLAN_SUFFIX:
        from features_cache.parted import open_parts  # which imports this module

        return open_parts(path)
    return CacheFile(path, read_header(path))


class CacheFile:
    """One cache file, read-only; `open_cache` makes it.

    Arrays are views of one read-only memory map, so they show rows that a writer adds later. Opening takes the same
    time for any number of rows.

    Parameters
    ----------
    path : Path
        The file.
    header : Header
        Its checked user block.

    Attributes
    ----------
    n_rows : int
        Count of images.
    classes : tuple of str
        Class names; labels index them.
    layers : dict of str to LayerInfo
        In creation order.
    handles : dict of str to str
        How users select the file: ``source``, ``backbone``, ``pool``.
    request : dict
        The request that the file was made for; opaque here.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self.path = path
        self.header = header
        self.n_rows = header.n_rows
        self.classes = header.classes
        self.layers = header.layers
        self.handles = header.handles
        self.request = header.request
        self._views: dict[str, np.memmap[Any, Any]] = {}

    @property
    def parts(self) -> tuple[CacheFile, ...]:
        """The files that hold the rows: this one; several for a cache in parts."""
        return (self,)

    @property
    def missing_note(self) -> str:
        """Which parts of a cache in parts are missing, in words; ``""`` if none is."""
        return ""

    @property
    def missing_rows(self) -> int:
        """Rows of the parts that are missing, about."""
        return 0

    def __repr__(self) -> str:
        return f"<CacheFile {self.path} with {self.n_rows} rows of {', '.join(self.layers)}>"

    def array(self, name: str) -> np.memmap[Any, Any]:
        """Return one array of the file, such as ``"/rows/label"``, as a read-only view; FORMAT.md lists them."""
        if name not in self._views:
            array = self.header.arrays[name]
            view = self._bytes[array.offset : array.end].view(array.dtype).reshape(array.shape)
            self._views[name] = cast("np.memmap[Any, Any]", view)  # slices of a memmap stay memmaps
        return self._views[name]

    def matrix(self, layer: str) -> np.memmap[Any, Any]:
        """Return the features of one layer without reading or checking them; `features` does both.

        Parameters
        ----------
        layer : str
            Name of a layer in `layers`.

        Returns
        -------
        memmap, shape (n_rows, dim)
            In the stored dtype; rows that are not done hold no meaningful values.

        Raises
        ------
        CacheError
            The layer is unknown.
        """
        return self.array(f"/features/{self.layer(layer).name}")

    def features(self, layer: str, rows: NDArray[np.int64] | slice) -> NDArray[Any]:
        """Read the features of finished rows, and check them against their checksums.

        Parameters
        ----------
        layer : str
            Name of a layer in `layers`.
        rows : ndarray of int64, shape (k,), or slice
            Row numbers, all of them done. A slice gives a view of the file.

        Returns
        -------
        ndarray, shape (k, dim)
            In the stored dtype.

        Raises
        ------
        CacheError
            The layer is unknown.
        DamagedCacheError
            Some of the features changed after they were written.
        """
        matrix = self.matrix(layer)
        found = matrix[rows] if isinstance(rows, slice) else np.asarray(matrix)[rows]
        if not isinstance(rows, slice):
            self.release(layer, rows)
        sums = self.array(f"/crc/{layer}")[rows]
        parts = list(chunks(len(found), self.layers[layer].row_bytes))
        sound = [crc_rows(found[part]) == sums[part] for part in parts]
        wrong = np.flatnonzero(~np.concatenate(sound)) if sound else np.empty(0, np.int64)
        if len(wrong):
            raise self._damaged(f"the features of {layer}", np.arange(self.n_rows)[rows][wrong])
        return found

    def check_columns(self) -> None:
        """Check uri, label, split, group, state and reading result of every row against their checksums.

        Raises
        ------
        DamagedCacheError
            Some of them changed after they were written.
        """
        found = [rows for rows, _ in damaged_columns(self, np.array(self.states))]
        wrong = np.unique(np.concatenate(found))
        if len(wrong):
            raise self._damaged("uri, label, split, group, state or reading result", wrong)

    def _damaged(self, what: str, rows: NDArray[np.int64]) -> DamagedCacheError:
        return DamagedCacheError(
            f"{self.path} is damaged in {len(rows)} of {self.n_rows} rows, first row {rows[0]}: {what} do not match "
            "the checksums; run cache verify with repair, then extract again"
        )

    def layer(self, name: str) -> LayerInfo:
        """Return the description of one layer; an unknown name raises `CacheError` with the nearest ones."""
        if name not in self.layers:
            raise CacheError(
                f"{self.path} has no layer {name}; it has {', '.join(self.layers)}{nearest(name, self.layers)}"
            )
        return self.layers[name]

    def xy(self, layer: str, split: str | None = None) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Return features and labels of all rows that are finished and labelled, checked against their checksums.

        Parameters
        ----------
        layer : str
            Name of a layer in `layers`.
        split : str, optional
            Only rows of this split (``""`` for rows without one); all by default.

        Returns
        -------
        X : ndarray, shape (k, dim)
            In the stored dtype; a view of the file if the rows are contiguous, else a copy.
        y : ndarray of int64, shape (k,)
            Indices into `classes`.

        Raises
        ------
        CacheError
            The layer or the split is unknown.
        DamagedCacheError
            Some of what was read changed after it was written.
        """
        self.layer(layer)
        self.check_columns()
        keep = (self.states == DONE) & (self.labels >= 0)
        if split is not None:
            if split not in SPLITS:
                raise CacheError(f"unknown split {split!r}; expected train, val or test{nearest(split, SPLITS)}")
            keep &= self.array("/rows/split") == split.encode()
        rows = np.flatnonzero(keep)
        if len(rows) and rows[-1] - rows[0] + 1 == len(rows):
            return self.features(layer, slice(rows[0], rows[-1] + 1)), np.asarray(self.labels[rows])
        return self.features(layer, rows), np.asarray(self.labels[rows])

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class index of each row, -1 for none; shape (n_rows,)."""
        return self.array("/rows/label")

    @property
    def states(self) -> NDArray[np.uint8]:
        """0 pending, 1 done, 2 unreadable; shape (n_rows,)."""
        return self.array("/rows/state")

    @property
    def pending(self) -> NDArray[np.bool_]:
        """Whether each row still has to be computed; shape (n_rows,).

        Rows whose image exists but could not be read count as pending: rights change, and network drives come back.
        """
        pending = self.states == PENDING
        unreadable = np.flatnonzero(self.states == UNREADABLE)
        pending[unreadable] = (self.sizes[unreadable] >= 0) & ~self.digests[unreadable].any(axis=1)
        return np.asarray(pending, bool)

    @property
    def digests(self) -> NDArray[np.uint8]:
        """blake2b-128 of each image file's bytes, zero if it was not read; shape (n_rows, 16)."""
        return self.array("/rows/digest")

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Bytes of each image file; shape (n_rows,)."""
        return self.array("/rows/size")

    @property
    def mtimes_ns(self) -> NDArray[np.int64]:
        """Modification time of each image file in nanoseconds; shape (n_rows,)."""
        return self.array("/rows/mtime_ns")

    @property
    def run_ids(self) -> NDArray[np.int32]:
        """Number of the run that finished each row, -1 for none; shape (n_rows,)."""
        return self.array("/rows/run")

    @property
    def reasons(self) -> NDArray[np.str_]:
        """The reason for each unreadable row, empty for others; shape (n_rows,)."""
        return self._text("/rows/reason")

    @cached_property
    def uris(self) -> NDArray[np.str_]:
        """Name of each image in its source; shape (n_rows,)."""
        return self._text("/rows/uri")

    @cached_property
    def splits(self) -> NDArray[np.str_]:
        """``""``, ``"train"``, ``"val"`` or ``"test"``; shape (n_rows,)."""
        return self._text("/rows/split")

    @cached_property
    def groups(self) -> NDArray[np.str_]:
        """Group of each row, empty for none; shape (n_rows,)."""
        return self._text("/rows/group")

    @property
    def runs(self) -> list[dict[str, Any]]:
        """Provenance of the runs that wrote to the file, oldest first; `run_ids` refers to their ``"run"``."""
        return decode_runs(self.array("/runs").tolist())

    def _text(self, name: str) -> NDArray[np.str_]:
        return decoded_text(np.array(self.array(name)))

    def release(self, layer: str, rows: NDArray[np.int64]) -> None:
        """Let the pages of rows that were copied no longer count as memory of this process; the system keeps them."""
        if len(rows) and hasattr(mmap, "MADV_DONTNEED"):
            array = self.header.arrays[f"/features/{layer}"]
            start = (array.offset + int(rows.min()) * array.row_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
            end = array.offset + (int(rows.max()) + 1) * array.row_bytes
            cast("mmap.mmap", self._bytes.base).madvise(mmap.MADV_DONTNEED, start, end - start)

    @cached_property
    def _bytes(self) -> np.memmap[Any, Any]:
        """The whole file, after a check that the path still names the file that was opened."""
        with explained(self.path, "read"):
            mapped = np.memmap(str(self.path), np.uint8, "r")
            if len(mapped) != self.header.file_bytes or read_line(self.path) != self.header.line:
                raise CacheError(f"{self.path} was replaced by another file after it was opened; open it again")
        return mapped
