"""Linear SVM, fast enough for a path of 45 values of C and for many rows.

The objective of each class against the rest is smooth and strictly convex, so Newton's method, warm-started upwards in
C, ends at the optimum that liblinear finds. Only rows within the margin of a class count for its step. Where they are
few, as they are where C is large, the step is solved from their products with each other. Otherwise conjugate gradients
find the steps of all classes at once. The spread of features differs by orders of magnitude between principal axes. In
units of the curvature along these, a step takes tens of passes over the rows instead of hundreds. L-BFGS makes fewer
where C is small, but where C is large it stops far from the optimum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property, partial

import numpy as np
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
_MOST_SOLVED = 512
"""The most rows within a class's margin for which its step is solved from products, not found in passes; also no more
than twice the features, because passes over narrow rows cost little."""
_MOST_CONDITION = 1e12
"""The largest condition of such a system; beyond it, float64 would no longer tell the penalty from rounding."""
_MOST_PICKED = 0.7
"""If more than this share of the rows is needed, all are read, because picking rows copies them."""


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
    weights = problem.zeros()
    for params in grid:
        weights, converged = problem.minimise(_costs(params, weight), weights, TOLERANCE)
        yield _scores(held, weights), converged


def separate(
    params: Params, train: Float32Array, signs: Float32Array, weight: Weights = None
) -> tuple[Float64Array, bool]:
    """Return the hyperplanes (K, d + 1) of one candidate, the intercepts last, and whether it converged."""
    problem = _SquaredHinge(train, signs)
    weights = problem.zeros()
    *rising, last = decades(params["C"], most=1 / problem.spread.sum())
    for c in rising:  # from zero, Newton's method would get stuck where C is large
        weights, _ = problem.minimise(_costs({"C": c}, weight), weights, TOLERANCE)
    return problem.minimise(_costs({"C": last}, weight), weights, FINAL_TOLERANCE)


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

    Weights w (K, d + 1) are for rows x with a one appended.
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

    @cached_property
    def products(self) -> Float64Array:
        """Products (n, n) of all rows with each other, a one appended."""
        return inner_products(self.rows, self.rows) + 1

    def zeros(self) -> Float64Array:
        """Return weights of zero."""
        return np.zeros((self.signs.shape[1], len(self.spread)))

    def minimise(self, costs: Float32Array, start: Float64Array, tolerance: float) -> tuple[Float64Array, bool]:
        """Return the weights, and whether no step would lower any sum by more than `tolerance` of its penalty.

        Where rounding lets no step lower a sum, its weights stay; they have converged if little was to be gained.
        """
        weights, scores = start.copy(), _scores(self.rows, start)
        left, stuck = np.arange(len(weights)), False
        for _ in range(MOST_ITERATIONS):
            gap, values = self._gap_and_values(costs, left, scores[:, left], weights[left])
            gradient = weights[left] - 2 * _sums(self.rows, costs * gap * self.signs[:, left])
            enough = np.maximum(tolerance * np.sum(weights[left] ** 2, axis=1) / 2, _ROUNDING * values)
            steps, falls = self._steps(2 * costs * (gap > 0), left, weights[left], gradient, enough)
            more = falls > enough
            left, steps, values = left[more], steps[more], values[more]
            if not len(left):
                return weights, not stuck
            slopes, moves = np.sum(steps * gradient[more], axis=1), _scores(self.rows, steps)
            sizes = np.ones((len(left), 1))
            for _ in range(_MOST_HALVINGS):
                tried = weights[left] + sizes * steps
                there = scores[:, left] + sizes.T.astype(np.float32) * moves
                short = (
                    self._gap_and_values(costs, left, there, tried)[1]
                    > (1 + _NOISE) * values + 1e-4 * sizes[:, 0] * slopes
                )
                if not short.any():
                    break
                sizes[short] /= 2
            weights[left], scores[:, left] = tried, there
            stuck |= bool(np.any(short & (falls[more] > _LITTLE * values)))
            left = left[~short]
        return weights, False

    def _gap_and_values(
        self, costs: Float32Array, which: IntArray, scores: Float32Array, weights: Float64Array
    ) -> tuple[Float32Array, Float64Array]:
        """Return how much each row lacks of its margin, (n, k), and the sums (k,), for k columns of the signs."""
        gap = np.maximum(1 - self.signs[:, which] * scores, 0)
        return gap, np.sum(weights**2, axis=1) / 2 + np.sum(costs * gap**2, axis=0, dtype=np.float64)

    def _steps(
        self,
        curvature: Float32Array,
        which: IntArray,
        weights: Float64Array,
        gradient: Float64Array,
        enough: Float64Array,
    ) -> tuple[Float64Array, Float64Array]:
        """Return Newton's steps (k, d + 1) for k columns of the signs, and by how much they lower their parabolas.

        The parabola's curvature is 1 and that of each row (n, k).
        """
        steps, falls = np.zeros_like(gradient), np.zeros(len(gradient))
        most = min(_MOST_SOLVED, 2 * self.rows.shape[1]) if len(self.rows) <= _MOST_PRODUCTS else 0
        few = (np.count_nonzero(curvature, axis=0) <= most) & (self.lengths @ curvature <= _MOST_CONDITION)
        for one in np.flatnonzero(few):
            steps[one] = self._bottom(curvature[:, one], self.signs[:, which[one]]) - weights[one]
            falls[one] = -steps[one] @ gradient[one] / 2
        many = np.flatnonzero(~few)
        steps[many], falls[many] = self._find_steps(curvature[:, many], gradient[many], enough[many])
        return steps, falls

    def _bottom(self, curvature: Float32Array, signs: Float32Array) -> Float64Array:
        """Return where the parabola of one column of signs (n,) is lowest: (d + 1,).

        That is a sum of the rows that have a `curvature` (n,), whose shares solve a system of as many equations
        (Chapelle 2007, "Training a support vector machine in the primal").
        """
        near = np.flatnonzero(curvature)
        system = self.products[np.ix_(near, near)]
        system[np.diag_indices(len(near))] += 1 / curvature[near]
        shares = solve(system, signs[near].astype(np.float64), assume_a="pos", overwrite_a=True, check_finite=False)
        return np.append(shares @ self.rows[near].astype(np.float64), shares.sum())

    def _find_steps(
        self, curvature: Float32Array, gradient: Float64Array, enough: Float64Array
    ) -> tuple[Float64Array, Float64Array]:
        """Return the steps and how much they lower their parabolas by conjugate gradients.

        Nothing is done for residuals far below `enough`.
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
