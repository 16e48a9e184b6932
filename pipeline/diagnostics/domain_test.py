"""A classifier two-sample test: can a linear classifier tell two sets of rows apart (Lopez-Paz & Oquab 2017)?

The classifier is ridge regression on labels of -1 and 1. Its held-out scores are a fixed matrix times the labels, so
one decomposition per fold serves the labels and all their permutations.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from pipeline.arrays import Float32Array, Float64Array

FOLDS = 5
PERMUTATIONS = 999
RIDGE = 1.0
"""Penalty in units of the mean squared length of a row."""


class DomainTest(NamedTuple):
    """The result of a domain test.

    Parameters
    ----------
    accuracy : float
        On held-out rows. Guessing gives 0.5, because both sets have equally many rows.
    p_value : float
        Proportion of permutations of the set labels, the true one included, that give at least this accuracy.
    scores : (2, m) float64
        Of the held-out rows of each set: below 0 towards the first set, above 0 towards the second.
    """

    accuracy: float
    p_value: float
    scores: Float64Array


def domain_test(
    first: Float32Array, second: Float32Array, seed: int = 0, permutations: int = PERMUTATIONS
) -> DomainTest:
    """Test whether two sets of rows are of one distribution.

    Labels are permuted inside each fold, where both sets have equally many rows. If the sets are of one distribution,
    all these permutations are equally likely, so the p-value is exact for any number of rows and features.

    Parameters
    ----------
    first, second : (m, d) float32
        Equally many rows of each, at least two. No row may be a copy of another.
    seed : int, default 0
        Draws folds and permutations.
    permutations : int, default 999
        The smallest possible p-value is ``1 / (permutations + 1)``.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> rows, others = (rng.normal(mean, 1, (20, 3)).astype(np.float32) for mean in (0, 3))
    >>> domain_test(rows, others).p_value
    0.001
    """
    rng = np.random.default_rng(seed)
    m = len(first)
    products = _products(np.vstack([first, second]))
    folds = np.concatenate([rng.permutation(np.arange(m) % FOLDS) for _ in range(2)])
    truth = np.repeat(np.array([[-1.0], [1.0]]), m, axis=0)
    labels = truth * np.ones(permutations + 1)  # the first column stays the truth
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
