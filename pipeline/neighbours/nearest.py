"""Exact nearest neighbours: blocks of rows against blocks of rows, by matrix products.

Rows have length 1, so an inner product is the cosine of the angle between two images' features.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.linalg import eigh

from pipeline.arrays import Float32Array, IntArray
from pipeline.errors import FitError
from pipeline.neighbours.rows import BLOCK, UnitRows

MOST_PAIRS = 20_000_000
"""Pairs of near images that are kept, 240 MB."""
_SKETCH = 128
_TILE = 1024
ROUNDING = 1e-5
"""How far squares and products of rows of length 1 are off in single precision, at most."""


class Pairs(NamedTuple):
    """Pairs of images, their indices (p,) int64 and similarities (p,) float32."""

    first: IntArray
    second: IntArray
    similarity: Float32Array


def nearest_rows(queries: Float32Array, rows: UnitRows, count: int) -> tuple[IntArray, Float32Array]:
    """Find the most similar rows of each query.

    Parameters
    ----------
    queries : (m, d) float32
        Of length 1.
    rows : UnitRows
        n rows, read once for each `BLOCK` queries.
    count : int
        How many to find; at most n are found.

    Returns
    -------
    indices : (m, k) int64
        Of rows, the most similar first; ties go to the lower index. k is the smaller of `count` and n.
    similarities : (m, k) float32
    """
    count = min(count, len(rows))
    indices = np.empty((len(queries), count), np.int64)
    similarities = np.empty((len(queries), count), np.float32)
    for begin in range(0, len(queries), BLOCK):
        part = slice(begin, begin + BLOCK)
        best: Float32Array = np.empty((len(queries[part]), 0), np.float32)
        found: IntArray = np.empty(best.shape, np.int64)
        for start, block in rows.blocks():
            products: Float32Array = queries[part] @ block.T
            numbers: IntArray = np.broadcast_to(np.arange(start, start + len(block)), products.shape)
            if products.shape[1] > count:
                kept = np.argpartition(-products, count - 1, axis=1)[:, :count]
                products, numbers = np.take_along_axis(products, kept, 1), np.take_along_axis(numbers, kept, 1)
            best, found = np.hstack([best, products]), np.hstack([found, numbers])
            order = np.lexsort((found, -best), axis=1)[:, :count]
            best, found = np.take_along_axis(best, order, 1), np.take_along_axis(found, order, 1)
        indices[part], similarities[part] = found, best
    return indices, similarities


def near_pairs(rows: UnitRows, threshold: float, others: UnitRows | None = None) -> Pairs:
    """Find all pairs of rows that are at least so similar: among `rows`, or between `rows` and `others`.

    The products are of sketches of the rows: their projection on the `_SKETCH` directions in which they differ most,
    and the length of what is left. By the Cauchy-Schwarz inequality these products are no smaller than the
    similarities, so no pair is missed; pairs whose bound reaches the threshold are then computed from whole rows.

    Parameters
    ----------
    rows : UnitRows
    threshold : float
        Least similarity.
    others : UnitRows, optional

    Returns
    -------
    Pairs
        ``first`` are rows, ``second`` are others, or later rows.

    Raises
    ------
    FitError
        There are more than `MOST_PAIRS`.
    """
    basis = _directions(rows)
    left = _sketch(rows, basis)
    right = left if others is None else _sketch(others, basis)
    found: list[Pairs] = []
    total = 0
    for start in range(0, len(left), BLOCK):
        block, mine = left[start : start + BLOCK], rows.take(np.arange(start, min(start + BLOCK, len(left))))
        for other in range(start if others is None else 0, len(right), BLOCK):
            first, second = _candidates(block, right, start, other, threshold - ROUNDING, same=others is None)
            pairs = _checked(first, second, mine, start, others or rows, threshold)
            total += len(pairs.first)
            if total > MOST_PAIRS:
                raise FitError(
                    f"more than {MOST_PAIRS:,} pairs of images have a similarity of {threshold:.3f} or more on "
                    f"{rows.layer}: nearly all look alike to it; use a higher threshold, or another layer"
                )
            found.append(pairs)
    return Pairs(*map(np.concatenate, zip(*found, strict=True)))


def _directions(rows: UnitRows) -> Float32Array:
    """Return an orthonormal basis (d, k) of what a sample of rows has most of."""
    sample = rows.take(np.linspace(0, len(rows) - 1, min(len(rows), BLOCK)).astype(np.int64)).astype(np.float64)
    dim = sample.shape[1]
    _, vectors = eigh(sample.T @ sample, subset_by_index=(max(0, dim - _SKETCH), dim - 1))
    return np.asarray(vectors, np.float32)


def _sketch(rows: UnitRows, basis: Float32Array) -> Float32Array:
    """Return (n, k + 1): rows on the basis, and the length of what is left of them."""
    sketch = np.empty((len(rows), basis.shape[1] + 1), np.float32)
    for start, block in rows.blocks():
        part = sketch[start : start + len(block)]
        part[:, :-1] = block @ basis
        lengths = np.einsum("nd,nd->n", block, block, dtype=np.float64)
        left = lengths - np.einsum("nk,nk->n", part[:, :-1], part[:, :-1], dtype=np.float64)
        part[:, -1] = np.sqrt(np.maximum(left, 0) + ROUNDING)
    return sketch


def _candidates(
    left: Float32Array, right: Float32Array, start: int, other: int, least: float, *, same: bool
) -> tuple[IntArray, IntArray]:
    """Return the pairs of a block of each side whose bound is at least `least`; of the same rows, each pair once."""
    firsts, seconds = [], []
    end = min(other + BLOCK, len(right))
    for top in range(0, len(left), _TILE):
        for across in range(other, end, _TILE):
            bounds = left[top : top + _TILE] @ right[across : min(across + _TILE, end)].T
            hits = np.flatnonzero(bounds >= least)
            first, second = np.divmod(hits, bounds.shape[1])
            first, second = first + (start + top), second + across
            kept = second > first if same else slice(None)
            firsts.append(first[kept])
            seconds.append(second[kept])
    return np.concatenate(firsts), np.concatenate(seconds)


def _checked(
    first: IntArray, second: IntArray, mine: Float32Array, start: int, others: UnitRows, threshold: float
) -> Pairs:
    """Keep the candidates whose similarity, computed from whole rows, reaches the threshold.

    `mine` are the rows from `start` on, among which are the first ones.
    """
    theirs = np.unique(second)
    whole = others.take(theirs)
    at, of = first - start, np.searchsorted(theirs, second)
    if len(first) > len(mine) * len(theirs) / 16:
        similarity = (mine @ whole.T)[at, of]
    else:
        similarity = np.empty(len(first), np.float32)
        for begin in range(0, len(first), BLOCK):
            part = slice(begin, begin + BLOCK)
            similarity[part] = np.einsum("nd,nd->n", mine[at[part]], whole[of[part]])
    kept = similarity >= threshold - ROUNDING
    return Pairs(first[kept], second[kept], np.minimum(similarity[kept], 1))
