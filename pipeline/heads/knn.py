"""Vote of the k nearest training rows by cosine distance, each weighted by the inverse of its distance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from pipeline.arrays import Float32Array, Float64Array, IntArray
from pipeline.heads.family import Family, Fitted, Params, Step, Weights

_K = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50)


class Knn(Family):
    """Scikit-learn's `KNeighborsClassifier` with ``weights="distance"``, so that class numbers break no ties.

    Its probabilities are the shares of the votes after one more vote, which is divided among all classes alike:
    ``(k share + 1 / K) / (k + 1)`` for K classes. So none is zero.
    """

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
        distances, neighbours = nearest_first(train, held, max(params["k"] for params in grid))
        for params in grid:
            k = params["k"]
            shares = _shares(codes[neighbours[:, :k]], distances[:, :k], len(classes))
            yield Step(np.asarray(classes[shares.argmax(axis=1)]), converged=True, probabilities=_smooth(shares, k))

    def fit(self, params: Params, train: Float32Array, y: IntArray, weight: Weights = None) -> Fitted:
        """Keep the rows in a `KNeighborsClassifier`."""
        model = KNeighborsClassifier(params["k"], metric="cosine", algorithm="brute", weights="distance")
        return Fitted(model.fit(train, y), params, converged=True)

    def predict_proba(self, estimator: Any, rows: Float32Array) -> Float64Array:
        """Return smoothed shares; those of models saved by older versions, whose votes count alike, stay above 0."""
        shares = np.asarray(estimator.predict_proba(rows), np.float64)
        if estimator.weights != "distance":
            return np.maximum(shares, np.finfo(np.float64).eps)
        return _smooth(shares, estimator.n_neighbors)


def nearest_first(train: Float32Array, held: Float32Array, most: int) -> tuple[Float64Array, IntArray]:
    """Return the cosine distances (m, most) of the training rows nearest to each held-out row, and their numbers."""
    index = NearestNeighbors(n_neighbors=most, metric="cosine", algorithm="brute").fit(train)
    distances, neighbours = index.kneighbors(held)
    return distances.astype(np.float64), neighbours


def inverse_distances(distances: Float64Array) -> Float64Array:
    """Return the weights of neighbours (m, k); equal rows outvote all others."""
    same = distances == 0
    return np.where(same.any(axis=1, keepdims=True), same, 1 / np.where(same, 1, distances))


def _shares(codes: IntArray, distances: Float64Array, count: int) -> Float64Array:
    """Return the share (m, count) that each class has in the weights of k neighbours (m, k)."""
    weights = inverse_distances(distances)
    cells = np.arange(len(codes))[:, None] * count + codes
    votes = np.bincount(cells.ravel(), weights.ravel(), len(codes) * count).reshape(len(codes), count)
    return np.asarray(votes / votes.sum(axis=1, keepdims=True))


def _smooth(shares: Float64Array, k: int) -> Float64Array:
    return np.asarray((k * shares + 1 / shares.shape[1]) / (k + 1))
