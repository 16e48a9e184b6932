"""Exact nearest neighbours: blocks of rows against blocks of rows, by matrix products.

Rows have length 1, so an inner product is the cosine of the angle between two images' features.
"""

from __future__ import annotations

from typing import NamedTuple

import joblib
import numpy as np
from scipy.linalg import eigh
from threadpoolctl import threadpool_limits

from pipeline.arrays import Float32Array, IntArray
from pipeline.errors import FitError
from pipeline.neighbours.rows import BLOCK, UnitRows

MOST_PAIRS = 20_000_000
"""Pairs of near images that are kept, 240 MB."""
_SKETCH = 128
_SHORT = 32
_TILE = 1024
_FEW = 1 / 256
"""Share of the pairs of a tile up to which products of single pairs take less time than that of the tile."""
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

    The products are of sketches of the rows: their projection on the directions that they have most of, and the length
    of what is left. By the Cauchy-Schwarz inequality these products are no smaller than the similarities, so no pair is
    missed. Pairs whose bound reaches the threshold on `_SHORT` directions are looked at on `_SKETCH` directions, then
    computed from whole rows.

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

    def compare(start: int, other: int, mine: Float32Array) -> Pairs:
        block = slice(start, start + BLOCK)
        first, second = _candidates(left, right, block, slice(other, other + BLOCK), threshold - ROUNDING)
        if others is None:
            first, second = first[second > first], second[second > first]
        return _checked(first, second, mine, start, others or rows, threshold)

    with threadpool_limits(1), joblib.Parallel(joblib.cpu_count(), prefer="threads", return_as="generator") as workers:
        for start in range(0, len(rows), BLOCK):
            mine = rows.take(np.arange(start, min(start + BLOCK, len(rows))))
            blocks = range(start if others is None else 0, len(right.whole), BLOCK)
            for pairs in workers(joblib.delayed(compare)(start, other, mine) for other in blocks):
                total += len(pairs.first)
                if total > MOST_PAIRS:
                    raise FitError(
                        f"more than {MOST_PAIRS:,} pairs of images have a similarity of {threshold:.3f} or more on "
                        f"{rows.layer}: nearly all look alike to it; use a higher threshold, or another layer"
                    )
                found.append(pairs)
    return Pairs(*map(np.concatenate, zip(*found, strict=True)))


class _Sketches(NamedTuple):
    """Rows on a basis, and the length of what is left of them, (n, k + 1): on all of it, and on its beginning."""

    whole: Float32Array
    short: Float32Array


def _directions(rows: UnitRows) -> Float32Array:
    """Return an orthonormal basis (d, k) of what a sample of rows has most of, the most first."""
    sample = rows.take(np.linspace(0, len(rows) - 1, min(len(rows), BLOCK)).astype(np.int64)).astype(np.float64)
    dim = sample.shape[1]
    _, vectors = eigh(sample.T @ sample, subset_by_index=(max(0, dim - _SKETCH), dim - 1))
    return np.asarray(vectors[:, ::-1], np.float32)


def _sketch(rows: UnitRows, basis: Float32Array) -> _Sketches:
    dims = basis.shape[1], min(basis.shape[1], _SHORT)
    sketches = _Sketches(*(np.empty((len(rows), dim + 1), np.float32) for dim in dims))
    for start, block in rows.blocks():
        projected = block @ basis
        lengths = np.einsum("nd,nd->n", block, block, dtype=np.float64)
        for sketch, dim in zip(sketches, dims, strict=True):
            part = sketch[start : start + len(block)]
            part[:, :-1] = projected[:, :dim]
            left = lengths - np.einsum("nk,nk->n", part[:, :-1], part[:, :-1], dtype=np.float64)
            part[:, -1] = np.sqrt(np.maximum(left, 0) + ROUNDING)
    return sketches


def _candidates(
    left: _Sketches, right: _Sketches, rows: slice, columns: slice, least: float
) -> tuple[IntArray, IntArray]:
    """Return the pairs of some rows of each side whose bound is at least `least`."""
    firsts, seconds = [], []
    for top in range(rows.start, min(rows.stop, len(left.whole)), _TILE):
        tile = slice(top, min(top + _TILE, rows.stop))
        for across in range(columns.start, min(columns.stop, len(right.whole)), _TILE):
            beside = slice(across, min(across + _TILE, columns.stop))
            bounds = left.short[tile] @ right.short[beside].T
            hits = np.flatnonzero(bounds >= least)
            few = len(hits) <= bounds.size * _FEW
            if not few:
                bounds = left.whole[tile] @ right.whole[beside].T
                hits = np.flatnonzero(bounds >= least)
            first, second = np.divmod(hits, bounds.shape[1])
            first, second = first + top, second + across
            if few:
                kept = np.einsum("nk,nk->n", left.whole[first], right.whole[second]) >= least
                first, second = first[kept], second[kept]
            firsts.append(first)
            seconds.append(second)
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
