"""Vote of the k nearest training rows by cosine distance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, cast

import numpy as np
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from pipeline.arrays import Float32Array, Float64Array, IntArray
from pipeline.heads.family import Family, Fitted, Params, Step, Weights

_K = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50)


class Knn(Family):
    """Scikit-learn's `KNeighborsClassifier`; vote shares are its probabilities."""

    probabilities = True
    fixed: ClassVar[Params] = {"k": 1}
    cost = 2e-8

    def grid(self, n_rows: int) -> Sequence[Params]:
        """Return the values of k that `n_rows` rows allow, the largest first."""
        return [{"k": k} for k in reversed(_K) if k <= n_rows]

    def path(
        self, grid: Sequence[Params], train: Float32Array, y: IntArray, held: Float32Array, weight: Weights = None
    ) -> Iterator[Step]:
        """Yield a `Step` for each candidate, all from one list of neighbours."""
        classes, codes = np.unique(y, return_inverse=True)
        most = max(params["k"] for params in grid)
        index = NearestNeighbors(n_neighbors=most, metric="cosine", algorithm="brute").fit(train)
        votes = codes[index.kneighbors(held, return_distance=False)]  # (m, most), nearest first
        for params in grid:
            shares = _shares(votes[:, : params["k"]], len(classes))
            predicted = cast("IntArray", classes[shares.argmax(axis=1)])  # ties go to the first class, as scikit-learn
            yield Step(predicted, converged=True, probabilities=shares)

    def fit(self, params: Params, train: Float32Array, y: IntArray, weight: Weights = None) -> Fitted:
        """Keep the rows in a `KNeighborsClassifier`."""
        model = KNeighborsClassifier(n_neighbors=params["k"], metric="cosine", algorithm="brute")
        return Fitted(model.fit(train, y), params, converged=True)


def _shares(codes: IntArray, count: int) -> Float64Array:
    """Return the share of votes (m, k) that each of `count` classes has in each row: (m, count)."""
    cells = np.arange(len(codes))[:, None] * count + codes
    votes = np.bincount(cells.ravel(), minlength=len(codes) * count).reshape(len(codes), count)
    return np.asarray(votes / codes.shape[1])
