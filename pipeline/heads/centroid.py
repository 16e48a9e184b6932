"""Nearest class mean by Euclidean distance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.neighbors import KNeighborsClassifier

from pipeline.arrays import Float32Array, Float64Array, IntArray
from pipeline.heads.family import Family, Fitted, Params, Step, Weights, of_both
from pipeline.heads.solvers.blocks import by_blocks, sum_blocks
from pipeline.heads.solvers.hyperplanes import Hyperplanes


class Centroid(Family):
    """Class means without parameters; every class counts alike, whatever its number of rows."""

    weighted = True
    streams = True
    memory = 0.5
    cost = 1e-8

    def grid(self, n_rows: int) -> Sequence[Params]:
        """Return the single candidate."""
        return [{}]

    def path(
        self, grid: Sequence[Params], train: Float32Array, y: IntArray, held: Float32Array, weight: Weights = None
    ) -> Iterator[Step]:
        """Yield the single `Step`."""
        for params in grid:
            model = self.fit(params, train, y).estimator
            scores = partial(by_blocks, partial(self.scores, model), held)
            yield Step(by_blocks(model.predict, held), converged=True, scores=scores)

    def fit(self, params: Params, train: Float32Array, y: IntArray, weight: Weights = None) -> Fitted:
        """Keep the class means as the rows of a 1-nearest-neighbour classifier.

        Scikit-learn's `NearestCentroid` also estimates spreads, which divides by zero with one row per class.
        """
        classes, counts = np.unique(y, return_counts=True)

        def sums(where: slice, rows: Float32Array) -> tuple[Float64Array]:
            return (np.stack([rows[y[where] == label].sum(axis=0, dtype=np.float64) for label in classes]),)

        means = sum_blocks(sums, train)[0] / counts[:, None]
        model = KNeighborsClassifier(n_neighbors=1, algorithm="brute").fit(means, classes)
        return Fitted(model, params, converged=True)

    def scores(self, estimator: Any, rows: Float32Array) -> Float64Array:
        """Return how much nearer rows are to one of two means than to the other, or -|x - m|² for each of several."""
        means = np.asarray(estimator._fit_X, np.float64)
        found = -euclidean_distances(rows.astype(np.float64), means, squared=True)
        return of_both(found[:, 1:] - found[:, :1]) if len(means) == 2 else np.asarray(found)

    def hyperplanes(self, estimator: Any) -> Hyperplanes:
        """Return -|x - m|² / 2 for each mean m, without -|x|² / 2, which is the same for all classes."""
        means = np.asarray(estimator._fit_X, np.float64)
        return Hyperplanes(means, -0.5 * np.square(means).sum(axis=1))
