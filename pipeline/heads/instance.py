"""Heads that keep training rows: RBF SVM, nearest neighbours, nearest centroid."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, cast

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from sklearn.svm import SVC

from pipeline.arrays import Float32Array, IntArray
from pipeline.heads.family import Family, Fitted, Params, Step

RBF_C = tuple(10.0**exponent for exponent in range(-1, 4))
RBF_WIDTHS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
"""Gamma in units of scikit-learn's ``"scale"``: one over the number of features times their variance."""
NEIGHBOURS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50)


class RbfSvm(Family):
    """SVM with a Gaussian kernel; C and gamma are searched on distances that are computed once."""

    weighted = True
    fixed: ClassVar[Params] = {"C": 1.0, "gamma": 1.0}
    most_rows = 8_000  # two tables of all pairs in float64: about 1 GB in each worker

    def grid(self, n_rows: int) -> Sequence[Params]:
        """Return 5 values of C by 6 of gamma, the latter relative to ``"scale"``."""
        return [{"C": c, "gamma": width} for c in RBF_C for width in RBF_WIDTHS]

    def path(
        self,
        grid: Sequence[Params],
        train: Float32Array,
        y: IntArray,
        held: Float32Array,
        weight: Float32Array | None = None,
    ) -> Iterator[Step]:
        """Yield a `Step` for each candidate."""
        among = euclidean_distances(train.astype(np.float64), squared=True)
        across = euclidean_distances(held.astype(np.float64), train.astype(np.float64), squared=True)
        scale = _scale(train)
        kernel = np.empty_like(among)
        for params in grid:
            gamma = scale * params["gamma"]
            np.exp(np.multiply(among, -gamma, out=kernel), out=kernel)
            model = SVC(C=params["C"], kernel="precomputed").fit(kernel, y, weight)
            yield Step(model.predict(np.exp(-gamma * across)), converged=True)

    def fit(self, params: Params, train: Float32Array, y: IntArray, weight: Float32Array | None = None) -> Fitted:
        """Train an `SVC`; the gamma handed back is absolute."""
        absolute = {"C": params["C"], "gamma": _scale(train) * params["gamma"]}
        return Fitted(SVC(kernel="rbf", **absolute).fit(train, y, weight), absolute, converged=True)


class Knn(Family):
    """Vote of the k nearest training rows by cosine; vote shares are its probabilities."""

    probabilities = True
    fixed: ClassVar[Params] = {"k": 1}

    def grid(self, n_rows: int) -> Sequence[Params]:
        """Return the values of k that `n_rows` rows allow, the largest first."""
        return [{"k": k} for k in reversed(NEIGHBOURS) if k <= n_rows]

    def path(
        self,
        grid: Sequence[Params],
        train: Float32Array,
        y: IntArray,
        held: Float32Array,
        weight: Float32Array | None = None,
    ) -> Iterator[Step]:
        """Yield a `Step` for each candidate, from one list of neighbours."""
        classes, codes = np.unique(y, return_inverse=True)
        most = max(params["k"] for params in grid)
        index = NearestNeighbors(n_neighbors=most, metric="cosine", algorithm="brute").fit(train)
        votes = codes[index.kneighbors(held, return_distance=False)]  # (m, most), nearest first
        for params in grid:
            shares = _shares(votes[:, : params["k"]], len(classes))
            predicted = cast("IntArray", classes[shares.argmax(axis=1)])  # the first of equals, as scikit-learn has it
            yield Step(predicted, converged=True, probabilities=shares)

    def fit(self, params: Params, train: Float32Array, y: IntArray, weight: Float32Array | None = None) -> Fitted:
        """Keep the rows in a `KNeighborsClassifier`."""
        model = KNeighborsClassifier(n_neighbors=params["k"], metric="cosine", algorithm="brute")
        return Fitted(model.fit(train, y), params, converged=True)


class Centroid(Family):
    """Nearest class mean by Euclidean distance; nothing to choose, and every class counts alike whatever its size."""

    weighted = True

    def grid(self, n_rows: int) -> Sequence[Params]:
        """Return the one candidate there is."""
        return [{}]

    def path(
        self,
        grid: Sequence[Params],
        train: Float32Array,
        y: IntArray,
        held: Float32Array,
        weight: Float32Array | None = None,
    ) -> Iterator[Step]:
        """Yield the one `Step`."""
        for params in grid:
            yield Step(self.fit(params, train, y).estimator.predict(held), converged=True)

    def fit(self, params: Params, train: Float32Array, y: IntArray, weight: Float32Array | None = None) -> Fitted:
        """Keep the class means as the rows of a 1-nearest-neighbour classifier.

        `NearestCentroid` estimates spreads too, which divides by zero at one row a class.
        """
        classes = np.unique(y)
        means = np.stack([train[y == label].mean(axis=0, dtype=np.float64) for label in classes])
        model = KNeighborsClassifier(n_neighbors=1, algorithm="brute").fit(means, classes)
        return Fitted(model, params, converged=True)


def _scale(train: Float32Array) -> float:
    variance = float(train.var(dtype=np.float64))
    return 1 / (train.shape[1] * variance) if variance > 0 else 1.0


def _shares(codes: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """Return the share of each of `count` classes in each line of votes: (m, k) to (m, count)."""
    cells = np.arange(len(codes))[:, None] * count + codes
    votes = np.bincount(cells.ravel(), minlength=len(codes) * count).reshape(len(codes), count)
    return np.asarray(votes / codes.shape[1])
