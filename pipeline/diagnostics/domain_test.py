"""Can a linear classifier tell two sets of rows apart? A classifier two-sample test (Lopez-Paz & Oquab 2017).

The classifier is ridge regression on labels of -1 and 1. Its held-out scores are a fixed matrix times the labels, so
one decomposition a fold serves the labels and all permutations of them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from pipeline.arrays import Float32Array, Float64Array

FOLDS = 5
PERMUTATIONS = 999
RIDGE = 1.0
"""Penalty in units of a row's mean squared length."""


class DomainTest(NamedTuple):
    """What the classifier found.

    Parameters
    ----------
    accuracy : float
        On held-out rows; a half is a guess, for both sets have as many rows.
    p_value : float
        Share of permutations of the set labels, this one included, that give at least this accuracy.
    scores : (2, m) float64
        Of each set's rows, when held out: below 0 towards the first set, above towards the second.
    """

    accuracy: float
    p_value: float
    scores: Float64Array


def domain_test(
    first: Float32Array, second: Float32Array, seed: int = 0, permutations: int = PERMUTATIONS
) -> DomainTest:
    """Test whether two sets of rows are of one distribution.

    Labels are permuted inside each fold, in which both sets have as many rows. If the sets are of one distribution, all
    these labellings are equally likely, so the p-value is exact whatever the number of rows and features.

    Parameters
    ----------
    first, second : (m, d) float32
        As many rows of each, at least two. No row of one set may be a copy of another.
    seed : int, default 0
        Draws folds and permutations.
    permutations : int, default 999
        The smallest p-value is one over one more.
    """
    rng = np.random.default_rng(seed)
    m = len(first)
    products = _products(np.vstack([first, second]))
    folds = np.concatenate([rng.permutation(np.arange(m) % FOLDS) for _ in range(2)])
    labels = np.repeat(np.array([[-1.0], [1.0]]), m, axis=0) * np.ones(
        permutations + 1
    )  # the first column is the truth
    for fold in range(FOLDS):
        rows = np.flatnonzero(folds == fold)
        labels[rows, 1:] = rng.permuted(labels[rows, 1:], axis=0)
    scores = np.empty_like(labels)
    for fold in range(FOLDS):
        held, train = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
        penalised = products[np.ix_(train, train)]
        penalised[np.diag_indices_from(penalised)] += RIDGE
        scores[held] = products[np.ix_(held, train)] @ cho_solve(cho_factor(penalised), labels[train])
    right = ((scores > 0) == (labels > 0)).sum(axis=0)
    p_value = float((right >= right[0]).mean())
    return DomainTest(right[0] / (2 * m), p_value, scores[:, 0].reshape(2, m))


def _products(rows: Float32Array) -> Float64Array:
    """Return inner products of standardised rows, in units of their mean squared length."""
    deviation = rows.std(axis=0, dtype=np.float64)
    centred = rows - rows.mean(axis=0, dtype=np.float64)
    scaled = centred / np.where(deviation > 0, deviation, 1.0)
    return np.asarray(scaled @ scaled.T / max(np.count_nonzero(deviation), 1))
