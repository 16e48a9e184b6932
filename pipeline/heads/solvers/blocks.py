"""Rows in blocks: products in float64 without a copy of all rows, and rows that stay in the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import joblib
import numpy as np
from sklearn import config_context

from pipeline.arrays import Float32Array, FloatArray, IntArray
from pipeline.images.ahead import map_ahead

R = TypeVar("R")
Scale = Callable[[Float32Array], Float32Array]

_CELLS = 1 << 22  # of a block in memory: 32 MiB in float64
_CELLS_READ = 1 << 20  # of a block of the cache, of which each thread has one or two: 4 MiB in float32


class RowBlocks:
    """A matrix (n, d) of float32 that float64 arrays multiply from either side, in float64."""

    __array_ufunc__ = None  # makes numpy leave products to this class

    def __init__(self, rows: Float32Array) -> None:
        self._rows = rows

    def __matmul__(self, right: FloatArray) -> FloatArray:
        return np.concatenate(
            [self._rows[part].astype(np.float64) @ right for part in _parts(self._rows.shape, _CELLS)]
        )

    def __rmatmul__(self, left: FloatArray) -> FloatArray:
        total = np.zeros((len(left), self._rows.shape[1]))
        for part in _parts(self._rows.shape, _CELLS):
            total += left[:, part] @ self._rows[part].astype(np.float64)
        return total


class StreamedRows:
    """A matrix (n, d) of float32 that is not in memory: each pass reads it from the cache, block by block.

    It stands where an array would, for families that say so (`Family.streams`), so types call it an array.

    Parameters
    ----------
    features : callable
        Maps row numbers (k,) to a fresh array (k, d) of float32; several threads call it at once.
    dim : int
        Number of features.
    index : (n,) int64
        The rows.
    scale : callable, optional
        Returns scaled rows, and may overwrite those it is given.
    """

    __array_ufunc__ = None  # makes numpy leave products to this class

    def __init__(
        self, features: Callable[[IntArray], Float32Array], dim: int, index: IntArray, scale: Scale | None = None
    ) -> None:
        self._features, self._index, self._scale = features, index, scale
        self.shape = (len(index), dim)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, part: slice) -> StreamedRows:
        return StreamedRows(self._features, self.shape[1], self._index[part], self._scale)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> FloatArray:
        return np.concatenate([*self.map(lambda _, block: block)]).astype(dtype or np.float32, copy=False)

    def __matmul__(self, right: FloatArray) -> FloatArray:
        return np.concatenate([*self.map(lambda _, block: block @ right)])

    def scaled_by(self, scale: Scale) -> Any:
        """Return the same rows, scaled."""
        return StreamedRows(self._features, self.shape[1], self._index, scale)

    def map(self, function: Callable[[slice, Float32Array], R]) -> Iterator[R]:
        """Yield ``function(where, block)`` for each block in order; all cores work on the blocks that follow."""
        threads = joblib.cpu_count()
        return map_ahead(
            lambda part: function(part, self._read(part)), _parts(self.shape, _CELLS_READ), threads, threads
        )

    def _read(self, part: slice) -> Float32Array:
        block = self._features(self._index[part])
        if self._scale is None:
            return block
        with config_context(assume_finite=True):  # `require_finite` has looked
            return self._scale(block)


def sum_blocks(function: Callable[[slice, Any], tuple[Any, ...]], rows: Any) -> tuple[Any, ...]:
    """Return the sum of each value of ``function(where, block)`` over the blocks of streamed rows.

    All rows of another matrix are one block.
    """
    if not isinstance(rows, StreamedRows):
        return function(slice(None), rows)
    parts = rows.map(function)
    total = next(parts)
    for values in parts:
        total = tuple(one + other for one, other in zip(total, values, strict=True))
    return total


def by_blocks(function: Callable[[Any], Any], rows: Float32Array) -> Any:
    """Return ``function(rows)``, an array with a line for each row, computed block by block if rows are streamed."""
    return (
        np.concatenate([*rows.map(lambda _, block: function(block))])
        if isinstance(rows, StreamedRows)
        else function(rows)
    )


def _parts(shape: tuple[int, ...], cells: int) -> Iterator[slice]:
    step = max(1, cells // shape[1])
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))
