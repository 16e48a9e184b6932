"""Rotate wide rows onto their span, so that n rows of d > n features become n rows of at most n.

The weights of a linear head with an l2 penalty are a combination of its training rows, so its scores are the same in an
orthonormal basis of the span. Distances to rows outside the span change, so other heads cannot be trained this way.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import solve_triangular
from scipy.linalg.lapack import dpstrf

from pipeline.arrays import Float32Array, Float64Array, IntArray

_COLUMNS = 4096


@dataclass(frozen=True)
class Span:
    """An orthonormal basis of the span of rows: `triangle`⁻¹ times the rows with the numbers `basis`.

    Parameters
    ----------
    rotated : (n, r) float32
        The rows in that basis.
    basis : (r,) int64
        Numbers of r linearly independent rows, r the rank.
    triangle : (r, r) float64
        These rows in that basis; lower triangular.
    """

    rotated: Float32Array
    basis: IntArray
    triangle: Float64Array

    def rotate(self, rows: Float32Array, others: Float32Array) -> Float32Array:
        """Return the projection of `others` (m, d) onto the span of `rows` (n, d): (m, r) float32."""
        products = inner_products(rows[self.basis], others)
        return np.asarray(solve_triangular(self.triangle, products, lower=True).T, np.float32)

    def unrotate(self, rows: Float32Array, weights: Float64Array) -> Float64Array:
        """Return weights (K, r) for rotated rows as weights (K, d) for the features of `rows` (n, d)."""
        shares = solve_triangular(self.triangle, weights.T, lower=True, trans="T")
        return np.asarray(shares.T @ rows[self.basis])


def find_span(rows: Float32Array) -> Span | None:
    """Return the span of rows (n, d), by pivoted Cholesky of their Gram matrix in float64 (Higham 1990).

    None if it is no narrower than the features, or all rows are zero.
    """
    n, d = rows.shape
    if d <= n or not rows.any():
        return None
    factor, pivots, rank, _ = dpstrf(inner_products(rows, rows), lower=1, overwrite_a=1)
    order = pivots.astype(np.int64) - 1
    triangle = np.tril(factor)[:, :rank]
    rotated = np.empty((n, rank), np.float32)
    rotated[order] = triangle
    return Span(rotated, order[:rank], np.ascontiguousarray(triangle[:rank]))


def inner_products(rows: Float32Array, others: Float32Array) -> Float64Array:
    """Return all inner products (n, m) in float64, converting a block of columns at a time."""
    total = np.zeros((len(rows), len(others)))
    for start in range(0, rows.shape[1], _COLUMNS):
        left = rows[:, start : start + _COLUMNS].astype(np.float64)
        right = left if others is rows else others[:, start : start + _COLUMNS].astype(np.float64)
        total += left @ right.T
    return total
