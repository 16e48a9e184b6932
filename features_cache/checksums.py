"""Three CRC-32 sums per row: features, source columns (uri, label, split, group), reading result."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from features_cache.layout import PENDING, RECORD, UNREADABLE

if TYPE_CHECKING:
    from features_cache.reader import CacheFile

_CHUNK_BYTES = 1 << 20


def crc_rows(rows: NDArray[Any]) -> NDArray[np.uint32]:
    """Return the CRC-32 of each row's bytes.

    Parameters
    ----------
    rows : ndarray, shape (n, ...) or a structured array of shape (n,)
        Summed row by row, over the bytes in C order.

    Returns
    -------
    ndarray of uint32, shape (n,)
    """
    if not len(rows):
        return np.empty(0, np.uint32)
    flat: Any = np.ascontiguousarray(rows).reshape(len(rows), -1).view(np.uint8)
    return np.fromiter(map(zlib.crc32, flat), np.uint32, len(flat))


def source_crc(
    labels: NDArray[Any], splits: NDArray[Any], groups: NDArray[Any], uris: NDArray[Any]
) -> NDArray[np.uint32]:
    """Return the CRC-32 of each row's stored label, split, group and uri, in this order; all of shape (n,)."""
    columns = [np.ascontiguousarray(column) for column in (labels, splits, groups, uris)]
    joined = np.empty(len(labels), np.dtype([(f"f{i}", column.dtype) for i, column in enumerate(columns)]))
    for i, column in enumerate(columns):
        joined[f"f{i}"] = column
    return crc_rows(joined)


def sound_sources(file: CacheFile, rows: NDArray[np.int64] | slice) -> NDArray[np.bool_]:
    """Return, for each row, whether label, split, group and uri match their checksum; shape (k,)."""
    columns = [np.asarray(file.array(f"/rows/{name}")[rows]) for name in ("label", "split", "group", "uri")]
    return np.asarray(source_crc(*columns) == file.array("/rows/source_crc")[rows], bool)


def sound_results(file: CacheFile, rows: NDArray[np.int64] | slice) -> NDArray[np.bool_]:
    """Return, for each finished row, whether its reading result matches its checksum; shape (k,)."""
    return np.asarray(crc_rows(records_of(file, rows)) == file.array("/rows/result_crc")[rows], bool)


def records_of(file: CacheFile, rows: NDArray[np.int64] | slice) -> NDArray[np.void]:
    """Return the stored reading results of some rows: `layout.RECORD`, shape (k,)."""
    found = np.zeros(len(file.states[rows]), RECORD)
    for field in RECORD.names or ():
        found[field] = file.array(f"/rows/{field}")[rows]
    return found


def damaged_columns(file: CacheFile, states: NDArray[np.uint8]) -> Iterator[tuple[NDArray[np.int64], str]]:
    """Yield row numbers and what is wrong with their columns.

    Parameters
    ----------
    file : CacheFile
    states : ndarray of uint8, shape (n_rows,)
        A copy of the file's states, taken before; rows that a writer finishes meanwhile are not checked.
    """
    labels = file.labels
    yield np.flatnonzero(states > UNREADABLE), "its state is unknown"
    yield np.flatnonzero((labels < -1) | (labels >= len(file.classes))), "its label has no class"
    for part in chunks(file.n_rows, 256):
        wrong = ~sound_sources(file, part)
        yield part.start + np.flatnonzero(wrong), "its uri, label, split or group is damaged"
        sound = sound_results(file, part)
        wrong = ~sound & (states[part] != PENDING)
        yield part.start + np.flatnonzero(wrong), "its digest, size, time, run or reason is damaged"
        flipped = sound & ((file.array("/rows/reason")[part] != b"") != (states[part] == UNREADABLE))
        yield part.start + np.flatnonzero(flipped & (states[part] != PENDING)), "its state contradicts its reason"


def chunks(n_rows: int, row_bytes: int) -> Iterator[slice]:
    """Yield slices that cover `n_rows` rows, each of about one MiB."""
    step = max(1, _CHUNK_BYTES // row_bytes)
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))
