"""Ridge: least squares on labels of -1 and 1, one hyperplane per class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import RidgeClassifier

from pipeline.arrays import Float32Array, Float64Array, FloatArray, IntArray
from pipeline.heads.family import Fitted, Params, Step, Weights
from pipeline.heads.linear import C_GRID, LinearFamily
from pipeline.heads.solvers.blocks import StreamedRows, sum_blocks
from pipeline.heads.solvers.hyperplanes import Hyperplanes, best_classes, one_against_rest


class Ridge(LinearFamily):
    """Scikit-learn's `RidgeClassifier`; alpha is 1 / C, and one decomposition serves all candidates."""

    fixed: ClassVar[Params] = {"alpha": 1.0}
    streams = True
    memory = 13.0
    cost = 1e-7

    def grid(self, n_rows: int) -> Sequence[Params]:
        """Return 45 values of alpha from 1e6 down to 1e-5."""
        return [{"alpha": 1 / c} for c in C_GRID]

    def path(
        self, grid: Sequence[Params], train: Float32Array, y: IntArray, held: Float32Array, weight: Weights = None
    ) -> Iterator[Step]:
        """Yield a `Step` for each candidate."""
        classes, signs = one_against_rest(y)
        for scores in follow_squares([params["alpha"] for params in grid], train, signs, held, weight):
            yield Step(best_classes(classes, scores), converged=True, scores=partial(np.asarray, scores))

    def fit(self, params: Params, train: Float32Array, y: IntArray, weight: Weights = None) -> Fitted:
        """Train a `RidgeClassifier` by singular values, for Cholesky fails on wide rows with a small alpha.

        Streamed rows are not wide: theirs are from sums of products.
        """
        model = RidgeClassifier(solver="svd", **params)
        if isinstance(train, StreamedRows):
            classes, signs = one_against_rest(y)
            solve_streamed(model, train, classes, signs, weight)
        else:
            model.fit(train.astype(np.float64), y, weight)
        return Fitted(model, params, converged=True)


def solve_streamed(
    model: Any, train: Float32Array, values: NDArray[Any], targets: FloatArray, weight: Weights = None
) -> None:
    """Fit a ridge of scikit-learn to streamed rows (n, d) and their targets (n, K).

    `values` are all classes, a row with and one without every label, or a number: what the model may predict.
    """
    sums = decompose(train, targets, weight)
    model.fit(np.zeros((len(values), train.shape[1])), values)
    coefficients, intercepts = sums.hyperplanes(sums.weights(model.alpha))
    model.coef_ = coefficients.reshape(model.coef_.shape)
    model.intercept_ = intercepts.reshape(np.shape(model.intercept_))[()]


class Sums(NamedTuple):
    """What weighted sums over rows tell of all solutions: the eigenvectors of their scatter, and targets along them."""

    mean: Float64Array  # (d,)
    middle: Float64Array  # (K,), of the targets
    values: Float64Array  # (d,)
    axes: Float64Array  # (d, d)
    along: Float64Array  # (d, K)

    def weights(self, alpha: float) -> Float64Array:
        """Return the coefficients (d, K) along the axes."""
        return self.along / (self.values + alpha)[:, None]

    def hyperplanes(self, weights: Float64Array) -> Hyperplanes:
        """Return coefficients (K, d) and intercepts (K,) for rows that are not centred."""
        coefficients = (self.axes @ weights).T
        return Hyperplanes(coefficients, self.middle - coefficients @ self.mean)


def decompose(train: Float32Array, targets: FloatArray, weight: Weights = None) -> Sums:
    """Sum over training rows (n, d) and their targets (n, K), in two passes: means, then products of centred rows."""
    of_rows = np.ones((len(targets), 1)) if weight is None else weight[:, None].astype(np.float64)

    def sums(where: slice, rows: Float32Array) -> tuple[Float64Array]:
        return (np.sum(of_rows[where] * rows, axis=0),)

    mean, middle = sum_blocks(sums, train)[0] / of_rows.sum(), np.sum(of_rows * targets, axis=0) / of_rows.sum()

    def products(where: slice, rows: Float32Array) -> tuple[Float64Array, Float64Array]:
        centred = rows - mean
        weighted = of_rows[where] * centred
        return weighted.T @ centred, weighted.T @ (targets[where] - middle)

    scatter, along = sum_blocks(products, train)
    values, axes = np.linalg.eigh(scatter)
    return Sums(mean, middle, np.maximum(values, 0), axes, axes.T @ along)  # below 0 is rounding


def follow_squares(
    alphas: Sequence[float], train: Float32Array, targets: FloatArray, held: Float32Array, weight: Weights = None
) -> Iterator[Float64Array]:
    """Yield the least-squares predictions (m, K) of `targets` (n, K) for each alpha, from one decomposition."""
    sums = decompose(train, targets, weight)
    unseen = None if isinstance(held, StreamedRows) else (held - sums.mean) @ sums.axes
    for alpha in alphas:
        weights = sums.weights(alpha)
        if unseen is not None:
            yield unseen @ weights + sums.middle
        else:
            coefficients, intercepts = sums.hyperplanes(weights)
            yield held @ coefficients.T + intercepts
