"""Products of rows in float32 with arrays in float64, without a copy of all rows in float64."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pipeline.arrays import Float32Array, Float64Array

_CELLS = 1 << 22  # of a block: 32 MiB in float64


class RowBlocks:
    """A matrix (n, d) of float32 that float64 arrays multiply from either side, in float64."""

    __array_ufunc__ = None  # makes numpy leave products to this class

    def __init__(self, rows: Float32Array) -> None:
        self._rows = rows

    def __matmul__(self, right: Float64Array) -> Float64Array:
        return np.concatenate([self._rows[part].astype(np.float64) @ right for part in self._parts()])

    def __rmatmul__(self, left: Float64Array) -> Float64Array:
        total = np.zeros((len(left), self._rows.shape[1]))
        for part in self._parts():
            total += left[:, part] @ self._rows[part].astype(np.float64)
        return total

    def _parts(self) -> Iterator[slice]:
        step = max(1, _CELLS // self._rows.shape[1])
        return (slice(start, start + step) for start in range(0, len(self._rows), step))
