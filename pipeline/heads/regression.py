"""Heads for numbers. Here `y` is (n,) float64, and so is what a `Step` predicts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import Ridge
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.neighbors import KNeighborsRegressor
from sklearn.svm import SVR

from pipeline.arrays import Float32Array, Float64Array
from pipeline.heads.family import Family, Fitted, Params, Step, Weights
from pipeline.heads.knn import Knn, inverse_distances, nearest_first
from pipeline.heads.rbf_svm import kernel_scale
from pipeline.heads.ridge import Ridge as ClassRidge
from pipeline.heads.ridge import follow_squares, solve_streamed
from pipeline.heads.solvers.blocks import StreamedRows
from pipeline.heads.solvers.hyperplanes import Hyperplanes

_C = (0.1, 1.0, 10.0, 100.0)
_GAMMA = (0.125, 0.5, 1.0, 2.0)
_EPSILON = (0.01, 0.1)


class RidgeRegression(ClassRidge):
    """Scikit-learn's `Ridge`: least squares; one decomposition serves all candidates."""

    weighted = False

    def path(
        self, grid: Sequence[Params], train: Float32Array, y: NDArray[Any], held: Float32Array, weight: Weights = None
    ) -> Iterator[Step]:
        """Yield a `Step` for each candidate."""
        for found in follow_squares([params["alpha"] for params in grid], train, y[:, None], held, weight):
            yield Step(found[:, 0], converged=True)

    def fit(self, params: Params, train: Float32Array, y: NDArray[Any], weight: Weights = None) -> Fitted:
        """Train a `Ridge` by singular values, or by sums of products, as for classes."""
        model = Ridge(solver="svd", **params)
        if isinstance(train, StreamedRows):
            solve_streamed(model, train, y[:1], y[:, None])
        else:
            model.fit(train.astype(np.float64), y, weight)
        return Fitted(model, params, converged=True)

    def hyperplanes(self, estimator: Any) -> Hyperplanes:
        """Return the coefficients (1, d) and the intercept (1,)."""
        return Hyperplanes(np.atleast_2d(estimator.coef_), np.atleast_1d(estimator.intercept_))


class KernelSvr(Family):
    """Scikit-learn's `SVR` with a Gaussian kernel; C and epsilon are in standard deviations of the training numbers."""

    fixed: ClassVar[Params] = {"C": 1.0, "gamma": 1.0, "epsilon": 0.1}
    most_rows = 8_000  # as for the SVM of classes
    cost = 3e-6

    def grid(self, n_rows: int) -> Sequence[Params]:
        """Return 4 values of C times 4 of gamma, the latter relative to ``"scale"``, times 2 of epsilon."""
        return [{"C": c, "gamma": gamma, "epsilon": epsilon} for c in _C for gamma in _GAMMA for epsilon in _EPSILON]

    def path(
        self, grid: Sequence[Params], train: Float32Array, y: NDArray[Any], held: Float32Array, weight: Weights = None
    ) -> Iterator[Step]:
        """Yield a `Step` for each candidate."""
        among = euclidean_distances(train.astype(np.float64), squared=True)
        across = euclidean_distances(held.astype(np.float64), train.astype(np.float64), squared=True)
        for params in grid:
            absolute = _absolute(params, train, y)
            gamma = absolute.pop("gamma")
            model = SVR(kernel="precomputed", tol=_tolerance(y), **absolute).fit(np.exp(-gamma * among), y, weight)
            yield Step(model.predict(np.exp(-gamma * across)), converged=True)

    def fit(self, params: Params, train: Float32Array, y: NDArray[Any], weight: Weights = None) -> Fitted:
        """Train an `SVR`; the returned parameters are absolute."""
        absolute = _absolute(params, train, y)
        model = SVR(kernel="rbf", tol=_tolerance(y), **absolute)
        return Fitted(model.fit(train, y, weight), absolute, converged=True)


def _tolerance(y: Float64Array) -> float:
    """Return scikit-learn's tolerance in units of `y` (n,); its own default is for numbers that spread by about 1."""
    return 1e-3 * (float(y.std()) or 1.0)


def _absolute(params: Params, train: Float32Array, y: Float64Array) -> Params:
    spread = float(y.std()) or 1.0
    gamma = kernel_scale(train) * params["gamma"]
    return {"C": spread * params["C"], "gamma": gamma, "epsilon": spread * params["epsilon"]}


class KnnRegression(Knn):
    """Scikit-learn's `KNeighborsRegressor` by cosine distance: the mean of k neighbours, the nearer the weightier."""

    probabilities = False

    def path(
        self, grid: Sequence[Params], train: Float32Array, y: NDArray[Any], held: Float32Array, weight: Weights = None
    ) -> Iterator[Step]:
        """Yield a `Step` for each candidate, all from one list of neighbours."""
        distances, neighbours = nearest_first(train, held, max(params["k"] for params in grid))
        for params in grid:
            weights = inverse_distances(distances[:, : params["k"]])
            yield Step(np.average(y[neighbours[:, : params["k"]]], axis=1, weights=weights), converged=True)

    def fit(self, params: Params, train: Float32Array, y: NDArray[Any], weight: Weights = None) -> Fitted:
        """Keep the rows in a `KNeighborsRegressor`."""
        model = KNeighborsRegressor(params["k"], metric="cosine", algorithm="brute", weights="distance")
        return Fitted(model.fit(train, y), params, converged=True)
