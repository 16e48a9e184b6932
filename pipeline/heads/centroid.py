"""Nearest class mean by Euclidean distance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from sklearn.neighbors import KNeighborsClassifier

from pipeline.arrays import Float32Array, IntArray
from pipeline.heads.family import Family, Fitted, Params, Step, Weights
from pipeline.heads.solvers.hyperplanes import Hyperplanes


class Centroid(Family):
    """Class means without parameters; every class counts alike, whatever its number of rows."""

    weighted = True
    cost = 1e-8

    def grid(self, n_rows: int) -> Sequence[Params]:
        """Return the single candidate."""
        return [{}]

    def path(
        self, grid: Sequence[Params], train: Float32Array, y: IntArray, held: Float32Array, weight: Weights = None
    ) -> Iterator[Step]:
        """Yield the single `Step`."""
        for params in grid:
            yield Step(self.fit(params, train, y).estimator.predict(held), converged=True)

    def fit(self, params: Params, train: Float32Array, y: IntArray, weight: Weights = None) -> Fitted:
        """Keep the class means as the rows of a 1-nearest-neighbour classifier.

        Scikit-learn's `NearestCentroid` also estimates spreads, which divides by zero with one row per class.
        """
        classes = np.unique(y)
        means = np.stack([train[y == label].mean(axis=0, dtype=np.float64) for label in classes])
        model = KNeighborsClassifier(n_neighbors=1, algorithm="brute").fit(means, classes)
        return Fitted(model, params, converged=True)

    def hyperplanes(self, estimator: Any) -> Hyperplanes:
        """Return -|x - m|² / 2 for each mean m, without -|x|² / 2, which is the same for all classes."""
        means = np.asarray(estimator._fit_X, np.float64)
        return Hyperplanes(means, -0.5 * np.square(means).sum(axis=1))
