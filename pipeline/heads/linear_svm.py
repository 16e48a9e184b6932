"""Linear SVM, fast enough for a path of 45 values of C.

liblinear cannot start from a neighbour's solution and slows down with C. Its objective is smooth and strictly convex,
so L-BFGS over all classes at once, warm-started upwards in C, finds the same optimum. L-BFGS alone is slow because the
spread of features differs by orders of magnitude between principal axes. Along these axes, in units of the objective's
own curvature, ten steps do the work of a hundred.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
from scipy.optimize import minimize
from sklearn.svm import LinearSVC

from pipeline.arrays import Float32Array, Float64Array, IntArray
from pipeline.heads.family import Fitted, Params, Step, Weights
from pipeline.heads.linear import LinearFamily
from pipeline.heads.solvers.hyperplanes import best_classes, one_against_rest

MOST_ITERATIONS = 1000
TOLERANCE = 1e-5
"""On the gradient in units of curvature, relative to the objective."""


class LinearSvm(LinearFamily):
    """Scikit-learn's `LinearSVC`: squared hinge loss, one class against the rest, penalised intercept."""

    cost = 1.5e-5

    def path(
        self, grid: Sequence[Params], train: Float32Array, y: IntArray, held: Float32Array, weight: Weights = None
    ) -> Iterator[Step]:
        """Yield a `Step` for each candidate; each starts from the optimum of the one before."""
        classes, signs = one_against_rest(y)
        for scores, converged in follow_margins(grid, train, signs, held, weight):
            yield Step(best_classes(classes, scores), converged, scores=partial(np.asarray, scores))

    def fit(self, params: Params, train: Float32Array, y: IntArray, weight: Weights = None) -> Fitted:
        """Train from zero and store the optimum in a `LinearSVC`."""
        classes, signs = one_against_rest(y)
        weights, converged = separate(params, train, signs, weight)
        model = LinearSVC(**params)
        model.classes_, model.n_features_in_ = classes, train.shape[1]
        model.coef_, model.intercept_ = weights[:, :-1].copy(), weights[:, -1].copy()
        return Fitted(model, params, converged)


def follow_margins(
    grid: Sequence[Params], train: Float32Array, signs: Float32Array, held: Float32Array, weight: Weights
) -> Iterator[tuple[Float32Array, bool]]:
    """Yield the scores (m, K) of `held` for each candidate, and whether it converged.

    `signs` (n, K) are 1 for rows of a class and -1 for others. Each starts from the optimum of the one before.
    """
    rows, axes, spread = _principal(train)
    held_rows = held @ axes[:-1] + axes[-1]
    weights = np.zeros((signs.shape[1], rows.shape[1]))
    for params in grid:
        weights, converged = _squared_hinge(rows, signs, _costs(params, weight), weights, spread)
        yield held_rows @ weights.T.astype(np.float32), converged


def separate(
    params: Params, train: Float32Array, signs: Float32Array, weight: Weights = None
) -> tuple[Float64Array, bool]:
    """Return the hyperplanes (K, d + 1) of one candidate, the intercepts last, and whether it converged."""
    rows, axes, spread = _principal(train)
    start = np.zeros((signs.shape[1], rows.shape[1]))
    found, converged = _squared_hinge(rows, signs, _costs(params, weight), start, spread)
    return found @ axes.T.astype(np.float64), converged


def _costs(params: Params, weight: Weights) -> Float32Array:
    """Return C of each row: (n, 1), or (1, 1) if all weigh the same."""
    ones = np.ones(1, np.float32) if weight is None else weight
    return np.asarray(params["C"] * ones[:, None], np.float32)


def _principal(train: Float32Array) -> tuple[Float32Array, Float32Array, Float64Array]:
    """Return rows with a one appended, along their principal axes (n, r); the axes (d + 1, r); squared spreads (r,)."""
    products = np.empty((train.shape[1] + 1, train.shape[1] + 1))
    products[:-1, :-1] = train.T @ train
    products[-1, :-1] = products[:-1, -1] = train.sum(axis=0, dtype=np.float64)
    products[-1, -1] = len(train)
    spread, axes = np.linalg.eigh(products)
    turned = axes.astype(np.float32)
    rows = train @ turned[:-1]
    rows += turned[-1]
    return rows, turned, np.maximum(spread, 0)


def _squared_hinge(
    rows: Float32Array, signs: Float32Array, costs: Float32Array, start: Float64Array, spread: Float64Array
) -> tuple[Float64Array, bool]:
    """Minimise ``|w|² / 2 + Σ costs max(0, 1 - s x·w)²`` for each column of `signs`; weights (K, r), converged."""

    def slack(weights: Float64Array) -> Float32Array:
        return np.asarray(np.maximum(1 - signs * (rows @ weights.T.astype(np.float32)), 0))

    def value(weights: Float64Array, gap: Float32Array) -> float:
        return 0.5 * float(np.sum(weights * weights)) + float(np.sum(costs * gap * gap, dtype=np.float64))

    weights = start
    while True:
        gap = slack(weights)
        before = value(weights, gap)
        active = np.asarray(np.mean(costs * (gap > 0), axis=0, dtype=np.float64))
        curvature = 1 + 2 * active[:, None] * spread
        unit = 1 / np.sqrt(curvature)  # (K, r)

        def objective(
            flat: Float64Array, unit: Float64Array = unit, scale: float = 1 / before
        ) -> tuple[float, Float64Array]:
            weights = flat.reshape(unit.shape) * unit
            gap = slack(weights)
            gradient = weights - 2 * ((costs * gap * signs).T @ rows)
            return scale * value(weights, gap), scale * (gradient * unit).ravel()

        options = {"maxiter": MOST_ITERATIONS, "gtol": TOLERANCE, "ftol": 1e-9, "maxls": 50}
        found = minimize(objective, (weights / unit).ravel(), jac=True, method="L-BFGS-B", options=options)
        weights = found.x.reshape(unit.shape) * unit
        if found.nit >= MOST_ITERATIONS:
            return weights, False
        if found.fun > 0.5:  # otherwise the tolerance was relative to a much too large value: go on
            return weights, True
