"""Logistic regression, fast enough for a path of 45 values of C.

The objective is that of scikit-learn's `LogisticRegression`, whose own solver, started from a neighbour's solution,
goes through the rows five times as often: it takes no account of how unevenly features spread, and its sums in float32
leave its line search groping about the optimum. Here products with rows are float32, sums over them float64.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from sklearn.linear_model import LogisticRegression

from pipeline.arrays import Float32Array, Float64Array, IntArray
from pipeline.heads.family import Fitted, Params, Step
from pipeline.heads.solvers.device import DeviceRows
from pipeline.heads.solvers.hyperplanes import OverC
from pipeline.heads.solvers.spectrum import find_spectrum

Rows = Float32Array | DeviceRows

MOST_ITERATIONS = 1000
TOLERANCE = 1e-9
"""About what the mean loss may still lose: half the square of its gradient in units of curvature. The final fit takes
that relative to a loss below 1, for where all rows are told apart there is little of it left."""


class Logreg(OverC):
    """Multinomial logistic regression with an l2 penalty; of two classes, the usual one of a single hyperplane.

    Parameters
    ----------
    device : str, optional
        Where products with rows are computed; on numpy arrays by default.
    """

    probabilities = True

    def __init__(self, device: str | None = None) -> None:
        self.device = device

    def path(
        self,
        grid: Sequence[Params],
        train: Float32Array,
        y: IntArray,
        held: Float32Array,
        weight: Float32Array | None = None,
    ) -> Iterator[Step]:
        """Yield a `Step` for each candidate."""
        loss, held_rows = Loss(train, y, weight, self.device), place(held, self.device)
        for weights, _, converged in follow(loss, [params["C"] for params in grid], relative=False):
            scores = loss.scores(held_rows, weights)
            yield Step(loss.classes[scores.argmax(axis=1)], converged, softmax(scores, axis=1))

    def fit(self, params: Params, train: Float32Array, y: IntArray, weight: Float32Array | None = None) -> Fitted:
        """Train, in decades of C above 1, and hand the optimum to a `LogisticRegression`.

        There a start from the class shares ends far from the optimum: the loss is nearly flat once all rows are told
        apart.
        """
        loss = Loss(train, y, weight, self.device)
        weights, steps, converged = deque(follow(loss, _decades(params["C"]), relative=True), maxlen=1).pop()
        model = LogisticRegression(**params)
        model.classes_, model.n_features_in_, model.n_iter_ = loss.classes, train.shape[1], np.array([steps])
        model.coef_, model.intercept_ = loss.hyperplanes(weights)
        return Fitted(model, params, converged)


def place(rows: Float32Array, device: str | None) -> Rows:
    """Return `rows` (n, d) on `device`, or as they are for None."""
    return rows if device is None else DeviceRows(rows, device)


class Loss:
    """The mean cross-entropy of rows under a linear model, and its penalised optimum.

    Weights are (k, d + 1), of k classes, or of the second alone where there are two. Their last column is the intercept
    of centred rows, which hardly depends on the others.

    Parameters
    ----------
    rows : (n, d) float32
    y : (n,) int64
    weight : (n,) float32, optional
        Of rows.
    device : str, optional
        Where the rows go.
    """

    def __init__(self, rows: Float32Array, y: IntArray, weight: Float32Array | None, device: str | None) -> None:
        self.rows, self.dim = place(rows, device), rows.shape[1]
        self.classes, self.codes = np.unique(y, return_inverse=True)
        weights = np.ones(len(y)) if weight is None else weight.astype(np.float64)
        self.total = float(weights.sum())
        self.shares = weights / self.total  # (n,)
        self.spectrum = find_spectrum(rows)

    def start(self) -> Float64Array:
        """Return the optimum for C = 0: no weights, and the logarithms of the class shares as intercepts."""
        logs = np.log(np.bincount(self.codes, self.shares))
        intercepts = logs[1:] - logs[:1] if len(logs) == 2 else logs - logs.mean()
        return np.hstack([np.zeros((len(intercepts), self.dim)), intercepts[:, None]])

    def hyperplanes(self, weights: Float64Array) -> tuple[Float64Array, Float64Array]:
        """Return coefficients (k, d) and intercepts (k,) for rows as they are."""
        return weights[:, :-1].copy(), weights[:, -1] - weights[:, :-1] @ self.spectrum.mean

    def scores(self, rows: Rows, weights: Float64Array) -> Float64Array:
        """Return the scores (m, K) of `rows` (m, d)."""
        coefficients, intercepts = self.hyperplanes(weights)
        scores = (rows @ coefficients.T.astype(np.float32)).astype(np.float64) + intercepts
        return np.hstack([np.zeros_like(scores), scores]) if len(self.classes) == 2 else scores

    def value_and_gradient(self, weights: Float64Array, penalty: float) -> tuple[float, Float64Array]:
        """Return the loss and its derivative by `weights`."""
        scores = self.scores(self.rows, weights)
        scores -= scores.max(axis=1, keepdims=True)
        rows = np.arange(len(scores))
        right = scores[rows, self.codes]
        odds = np.exp(scores, out=scores)
        sums = odds.sum(axis=1)
        value = float((np.log(sums) - right) @ self.shares) + penalty / 2 * float(np.sum(weights[:, :-1] ** 2))
        odds *= (self.shares / sums)[:, None]
        odds[rows, self.codes] -= self.shares
        off = odds[:, -len(weights) :]  # (n, k)
        by_intercepts = off.sum(axis=0)
        by_coefficients = off.T.astype(np.float32) @ self.rows - np.outer(by_intercepts, self.spectrum.mean)
        return value, np.hstack([by_coefficients + penalty * weights[:, :-1], by_intercepts[:, None]])

    def minimise(self, c: float, start: Float64Array, *, relative: bool) -> tuple[Float64Array, int, bool]:
        """Return the optimal weights for C = `c`, the steps taken from `start`, and whether these sufficed."""
        penalty = 1 / (c * self.total)
        logs = log_softmax(self.scores(self.rows, start), axis=1)
        doubt = 1 - np.sum(np.exp(2 * logs), axis=1)
        curvature = float(doubt @ self.shares) / len(self.classes)
        entropy = -float(logs[np.arange(len(logs)), self.codes] @ self.shares)
        left = TOLERANCE * (min(1, entropy) if relative else 1)
        units = self.spectrum.units(curvature, penalty)

        def objective(flat: Float64Array) -> tuple[float, Float64Array]:
            value, gradient = self.value_and_gradient(units.apply(flat.reshape(start.shape)), penalty)
            return value, units.apply(gradient).ravel()

        options = {"maxiter": MOST_ITERATIONS, "gtol": math.sqrt(2 * left), "ftol": left / 10, "maxls": 50}
        begin = units.inverse().apply(start)
        found = minimize(objective, begin.ravel(), jac=True, method="L-BFGS-B", options=options)
        return units.apply(found.x.reshape(start.shape)), int(found.nit), found.nit < MOST_ITERATIONS


def follow(loss: Loss, values: Sequence[float], *, relative: bool) -> Iterator[tuple[Float64Array, int, bool]]:
    """Minimise for one value of C after the other, each from where the line through the last two optima leads.

    Along an evenly spaced logarithm of C weights change steadily, so this halves the steps that starting where the last
    one ended takes (a predictor-corrector path; Allgower and Georg 1990).
    """
    weights, before = loss.start(), None
    for c in values:
        start = weights if before is None else 2 * weights - before
        before = weights
        weights, steps, converged = loss.minimise(c, start, relative=relative)
        yield weights, steps, converged


def _decades(c: float) -> list[float]:
    """Return `c` alone up to 1, and above it every value a factor of ten apart from there up to it."""
    below = max(math.ceil(math.log10(c)), 0)
    return [c / 10**power for power in range(below, -1, -1)]
