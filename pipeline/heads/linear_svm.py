"""Linear SVM, fast enough for a path of 45 values of C and for many rows.

The objective of each class against the rest is smooth and strictly convex, so Newton's method, warm-started upwards in
C, ends at the optimum that liblinear finds. Only rows within the margin of a class count for its step. Where they are
few, or C is large, the step is solved in float64 from their products with each other, as long as these fit into memory.
Otherwise conjugate gradients find the steps of all classes at once. The spread of features differs by orders of
magnitude between principal axes. In units of the curvature along these, a step takes tens of passes over the rows
instead of hundreds. L-BFGS makes fewer where C is small, but where C is large it stops far from the optimum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve
from sklearn.svm import LinearSVC

from pipeline.arrays import Float32Array, Float64Array, IntArray
from pipeline.heads.family import Fitted, Params, Step, Weights
from pipeline.heads.linear import LinearFamily, decades
from pipeline.heads.solvers.hyperplanes import best_classes, one_against_rest
from pipeline.heads.solvers.span import inner_products

MOST_ITERATIONS = 100
TOLERANCE = 1e-5
"""How much the objective may still fall, as the next step of Newton's method predicts, in units of its penalty. The
square of the weights' distance to the optimum, in units of theirs, is no larger."""
FINAL_TOLERANCE = 1e-7
"""The same of a final fit."""
_ROUNDING = 1e-9
"""The same in units of the objective, where its penalty is tiny."""
_LITTLE = 1e-4
"""The same where rounding ends a fit that has converged."""
_NOISE = 1e-8
"""What rounding of scores to float32 may add to the objective, in its units."""
_MOST_PASSES = 1000
_INEXACT = 0.1
"""A step is exact enough once its residual, in units of curvature, is this share of the gradient."""
_MOST_HALVINGS = 30
_BLOCK = 1024
_MOST_PRODUCTS = 4096
"""The most rows whose products with each other are kept, 8 bytes each: 134 MB."""
_FEW = 512
"""With up to so many rows within a class's margin, its step is solved from their products, which takes less time than
passes over them."""
_CONDITION_OF_FLOAT32 = 1e7
"""Where the sum of a step's curvatures is larger, rounding to float32 would spoil it in passes over the rows. So it is
solved with more than `_FEW` rows, too, up to twice the features: passes over narrow rows cost little."""
_CONDITION_OF_FLOAT64 = 1e12
"""No step is solved where that sum is larger: float64 would not tell the penalty from rounding."""
_MOST_PICKED = 0.7
"""If more than this share of the rows is needed, all are read, because picking rows copies them."""


class LinearSvm(LinearFamily):
    """Scikit-learn's `LinearSVC`: squared hinge loss, one class against the rest, penalised intercept."""

    cost = 1.5e-5

    def bytes_beside(self, n_rows: int, folds: int) -> int:
        """Return the bytes of the products of rows with each other, and of those that a step is solved from."""
        return 8 * n_rows**2 * (folds + 2) if n_rows <= _MOST_PRODUCTS else 0

    def path(
        self, grid: Sequence[Params], train: Float32Array, y: IntArray, held: Float32Array, weight: Weights = None
    ) -> Iterator[Step]:
        """Yield a `Step` for each candidate; each starts from the optimum of the one before."""
        classes, signs = one_against_rest(y)
        for scores, converged in follow_margins(grid, train, signs, held, weight):
            yield Step(best_classes(classes, scores), converged, scores=partial(np.asarray, scores))

    def fit(self, params: Params, train: Float32Array, y: IntArray, weight: Weights = None) -> Fitted:
        """Train from zero, upwards in C, and store the optimum in a `LinearSVC`."""
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
    problem = _SquaredHinge(train, signs)
    for params in grid:
        converged = problem.minimise(_costs(params, weight), TOLERANCE)
        yield _scores(held, problem.weights), converged


def separate(
    params: Params, train: Float32Array, signs: Float32Array, weight: Weights = None
) -> tuple[Float64Array, bool]:
    """Return the hyperplanes (K, d + 1) of one candidate, the intercepts last, and whether it converged."""
    problem = _SquaredHinge(train, signs)
    *rising, last = decades(params["C"], most=1 / problem.spread.sum())
    for c in rising:  # from zero, Newton's method would get stuck where C is large
        problem.minimise(_costs({"C": c}, weight), TOLERANCE)
    converged = problem.minimise(_costs({"C": last}, weight), FINAL_TOLERANCE)
    return problem.weights, converged


def _costs(params: Params, weight: Weights) -> Float32Array:
    """Return C of each row: (n, 1), or (1, 1) if all weigh the same."""
    ones = np.ones(1, np.float32) if weight is None else weight
    return np.asarray(params["C"] * ones[:, None], np.float32)


def _scores(rows: Float32Array, weights: Float64Array) -> Float32Array:
    """Return the scores (n, K) of `rows` (n, d) for hyperplanes (K, d + 1)."""
    columns = weights.T.astype(np.float32)
    return np.asarray(rows @ columns[:-1] + columns[-1])


def _sums(rows: Float32Array, shares: Float32Array) -> Float64Array:
    """Return the sums (K, d + 1) of `rows` (n, d), with a one appended, times `shares` (n, K)."""
    ones = shares.sum(axis=0, dtype=np.float64)
    return np.hstack([(shares.T @ rows).astype(np.float64), ones[:, None]])


class _SquaredHinge:
    """The sum ``|w|² / 2 + Σ costs max(0, 1 - s x·w)²`` of each of K columns of signs s, and its minimum.

    Attributes
    ----------
    weights : (K, d + 1) float64
        For rows x with a one appended; zeros at first, and then where the last call of `minimise` found the minimum.
    scores : (n, K)
        Of the rows with these weights: float64 for few rows, where that costs little, so that rounding does not hide
        how the sum falls where C is large.
    """

    def __init__(self, rows: Float32Array, signs: Float32Array) -> None:
        self.rows, self.signs = rows, signs
        products = np.empty((rows.shape[1] + 1, rows.shape[1] + 1))
        products[:-1, :-1] = rows.T @ rows
        products[-1, :-1] = products[:-1, -1] = rows.sum(axis=0, dtype=np.float64)
        products[-1, -1] = len(rows)
        spread, self.axes = np.linalg.eigh(products)
        self.spread = np.maximum(spread, 0) / len(rows)
        self.lengths = np.einsum("ij,ij->i", rows, rows) + 1
        self.is_small = len(rows) <= _MOST_PRODUCTS
        self.weights = np.zeros((signs.shape[1], len(spread)))
        self.scores = np.zeros(signs.shape, np.float64 if self.is_small else np.float32)

    @cached_property
    def products(self) -> Float64Array:
        """Products (n, n) of all rows with each other, a one appended."""
        found = inner_products(self.rows, self.rows)
        found += 1
        return found

    def minimise(self, costs: Float32Array, tolerance: float) -> bool:
        """Move the weights to the minimum; tell whether no step lowers any sum by more than `tolerance` of its penalty.

        Where rounding lets no step lower a sum, its weights stay; they have converged if little was to be gained.
        """
        if not self.is_small:  # their rounding would add up from one call to the next
            self.scores = _scores(self.rows, self.weights)
        left, stuck = np.arange(len(self.weights)), False
        for _ in range(MOST_ITERATIONS):
            gap, values = self._gap_and_values(costs, left, self.scores[:, left], self.weights[left])
            enough = np.maximum(tolerance * np.sum(self.weights[left] ** 2, axis=1) / 2, _ROUNDING * values)
            steps, moves, falls = self._steps(costs, gap, left, enough)
            more = falls > enough
            left, steps, moves, falls, values = left[more], steps[more], moves[:, more], falls[more], values[more]
            if not len(left):
                return not stuck
            sizes = np.ones(len(left), moves.dtype)
            for _ in range(_MOST_HALVINGS):
                tried, there = self.weights[left] + sizes[:, None] * steps, self.scores[:, left] + sizes * moves
                now = self._gap_and_values(costs, left, there, tried)[1]
                short = now > (1 + _NOISE) * values - 2e-4 * sizes * falls
                if not short.any():
                    break
                sizes[short] /= 2
            lower = ~short & (now < values)
            self.weights[left[lower]], self.scores[:, left[lower]] = tried[lower], there[:, lower]
            stuck |= bool(np.any(falls[~lower] > _LITTLE * values[~lower]))
            left = left[lower]
        return not len(left) and not stuck

    def _gap_and_values(
        self, costs: Float32Array, which: IntArray, scores: NDArray[Any], weights: Float64Array
    ) -> tuple[NDArray[Any], Float64Array]:
        """Return how much each row lacks of its margin, (n, k), and the sums (k,), for k columns of the signs."""
        gap = np.maximum(1 - self.signs[:, which] * scores, 0)
        return gap, np.sum(weights**2, axis=1) / 2 + np.sum(costs * gap**2, axis=0, dtype=np.float64)

    def _steps(
        self, costs: Float32Array, gap: NDArray[Any], which: IntArray, enough: Float64Array
    ) -> tuple[Float64Array, NDArray[Any], Float64Array]:
        """Return Newton's steps (k, d + 1) for k columns of the signs, how they change scores, (n, k), and the sums.

        A step goes to where the sum would be lowest if the rows within the margin stayed the same. It is exact where
        these are few. Nothing is done for steps that lower a sum by far less than `enough`.
        """
        curvature = np.asarray(2 * costs * (gap > 0), np.float32)
        near, condition = np.count_nonzero(curvature, axis=0), self.lengths @ curvature
        solved = (near <= _FEW) | (condition > _CONDITION_OF_FLOAT32)
        solved &= self.is_small & (near <= 2 * self.rows.shape[1]) & (condition <= _CONDITION_OF_FLOAT64)
        steps, falls = np.empty((len(which), len(self.spread))), np.empty(len(which))
        moves = np.empty(gap.shape, self.scores.dtype)
        if not solved.all():
            many = np.flatnonzero(~solved)
            off = np.asarray(2 * costs * gap[:, many] * self.signs[:, which[many]], np.float32)
            gradient = self.weights[which[many]] - _sums(self.rows, off)
            steps[many], falls[many] = self._find_steps(curvature[:, many], gradient, enough[many])
            moves[:, many] = _scores(self.rows, steps[many])
        for one in np.flatnonzero(solved):
            weights, scores = self._bottom(curvature[:, one], self.signs[:, which[one]])
            steps[one], moves[:, one] = weights - self.weights[which[one]], scores - self.scores[:, which[one]]
            falls[one] = (steps[one] @ steps[one] + curvature[:, one] @ moves[:, one] ** 2) / 2
        return steps, moves, falls

    def _bottom(self, curvature: Float32Array, signs: Float32Array) -> tuple[Float64Array, Float64Array]:
        """Return the weights (d + 1,) where a column's parabola is lowest, and the scores (n,) of all rows with them.

        The weights are a sum of the rows that have a `curvature` (n,), whose shares solve a system of as many equations
        (Chapelle 2007, "Training a support vector machine in the primal").
        """
        near = np.flatnonzero(curvature)
        products = self.products[near]
        system = products[:, near]
        system[np.diag_indices(len(near))] += 1 / curvature[near]
        shares = solve(system, signs[near].astype(np.float64), assume_a="pos", overwrite_a=True, check_finite=False)
        return np.append(shares @ self.rows[near].astype(np.float64), shares.sum()), shares @ products

    def _find_steps(
        self, curvature: Float32Array, gradient: Float64Array, enough: Float64Array
    ) -> tuple[Float64Array, Float64Array]:
        """Find Newton's steps (k, d + 1) by conjugate gradients; return them and how much they lower the sums, (k,).

        `curvature` (n, k) is that of each row, and `gradient` (k, d + 1) that of the sums.
        """
        units = 1 / (1 + curvature.sum(axis=0, dtype=np.float64)[:, None] * self.spread)

        def in_units(residual: Float64Array, which: IntArray) -> Float64Array:
            return np.asarray(((residual @ self.axes) * units[which]) @ self.axes.T)

        steps, falls, residual = np.zeros_like(gradient), np.zeros(len(gradient)), -gradient
        ways = in_units(residual, np.arange(len(gradient)))
        sizes = np.sum(residual * ways, axis=1)
        goals = np.maximum(_INEXACT**2 * sizes, enough / 10)
        live = np.flatnonzero(sizes > goals)
        for _ in range(_MOST_PASSES):
            if not len(live):
                break
            turned = ways[live] + self._products(curvature[:, live], ways[live])
            lengths = sizes[live] / np.sum(ways[live] * turned, axis=1)
            steps[live] += lengths[:, None] * ways[live]
            falls[live] += lengths * sizes[live] / 2
            residual[live] -= lengths[:, None] * turned
            scaled = in_units(residual[live], live)
            before, sizes[live] = sizes[live], np.sum(residual[live] * scaled, axis=1)
            ways[live] = scaled + (sizes[live] / before)[:, None] * ways[live]
            live = live[sizes[live] > goals[live]]
        return steps, falls

    def _products(self, curvature: Float32Array, ways: Float64Array) -> Float64Array:
        """Return the products (k, d + 1) of k directions with the sum of the curvatures of rows (n, k)."""
        needed = np.flatnonzero(curvature.any(axis=1))
        every = len(needed) > _MOST_PICKED * len(curvature)
        total = np.zeros_like(ways)
        for begin in range(0, len(curvature) if every else len(needed), _BLOCK):
            where = slice(begin, begin + _BLOCK)
            some = where if every else needed[where]
            rows = self.rows[some]
            total += _sums(rows, curvature[some] * _scores(rows, ways))
        return total
