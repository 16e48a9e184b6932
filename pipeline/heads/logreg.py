"""Logistic regression, fast enough for a path of 45 values of C.

The objective is that of scikit-learn's `LogisticRegression`. Its own solver, even if started from a neighbour's
solution, makes five times as many passes over the rows: it ignores how unevenly features spread, and with sums in
float32 its line search does not settle near the optimum. Here products with rows are float32, sums over them float64.
A final fit goes on in float64, until the order of rows and classes no longer shows in its probabilities.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from sklearn.linear_model import LogisticRegression

from pipeline.arrays import Float32Array, Float64Array, FloatArray, IntArray
from pipeline.heads.family import Family, Fitted, Params, Step, Weights
from pipeline.heads.linear import LinearFamily, decades
from pipeline.heads.solvers.blocks import RowBlocks, StreamedRows, sum_blocks
from pipeline.heads.solvers.device import DeviceRows
from pipeline.heads.solvers.spectrum import find_spectrum

Matrix = Float32Array | RowBlocks | DeviceRows

MOST_ITERATIONS = 1000
TOLERANCE = 1e-9
"""About how much the mean loss may still fall: half the square of its gradient in units of curvature. The final fit
takes this relative to a loss below 1, because the loss is tiny once the classes are separated."""
FINAL_TOLERANCE = 1e-16
"""The same where a final fit ends: probabilities are then right to 1e-6."""


class Logreg(LinearFamily):
    """Multinomial logistic regression with an l2 penalty; with a single hyperplane for two classes.

    Parameters
    ----------
    device : str, optional
        Where torch computes products with rows; by default numpy does.
    """

    probabilities = True
    streams = True
    memory = 0.6
    cost = 1.2e-6

    def __init__(self, device: str | None = None) -> None:
        self.device = device

    def on_device(self, device: str) -> Family:
        """Return this family with products computed on `device`."""
        return Logreg(device)

    def path(
        self, grid: Sequence[Params], train: Float32Array, y: IntArray, held: Float32Array, weight: Weights = None
    ) -> Iterator[Step]:
        """Yield a `Step` for each candidate."""
        loss, held_rows = Loss(train, y, weight, self.device), on_device(self.device, held)
        for weights, _, converged in follow(loss, [params["C"] for params in grid], relative=False):
            scores = loss.scores(held_rows, weights)
            yield Step(loss.classes[scores.argmax(axis=1)], converged, softmax(scores, axis=1))

    def fit(self, params: Params, train: Float32Array, y: IntArray, weight: Weights = None) -> Fitted:
        """Train and store the optimum in a `LogisticRegression`."""
        loss = Loss(train, y, weight, self.device)
        weights, steps, converged = find_optimum(loss, params["C"])
        model = LogisticRegression(**params)
        model.classes_, model.n_features_in_, model.n_iter_ = loss.classes, train.shape[1], np.array([steps])
        model.coef_, model.intercept_ = loss.hyperplanes(weights)
        return Fitted(model, params, converged)


def on_device(device: str | None, rows: Float32Array) -> Matrix:
    """Return `rows` (n, d) on `device`, unchanged if that is None or rows are streamed."""
    return rows if device is None or isinstance(rows, StreamedRows) else DeviceRows(rows, device)


class Loss:
    """The mean cross-entropy of rows under a linear model, and its penalised optimum.

    Weights are (k, d + 1) for k classes, or (1, d + 1) for the second of two. The last column is the intercept for
    centred rows, which hardly depends on the other columns.

    Parameters
    ----------
    rows : (n, d) float32
        In memory, or streamed: then each step reads them once.
    y : (n,) int64
    weight : (n,) float32 or None
        Of the rows.
    device : str or None
        Where the rows go.
    """

    def __init__(self, rows: Float32Array, y: IntArray, weight: Weights, device: str | None) -> None:
        self.rows: Matrix = on_device(device, rows)
        self.dim = rows.shape[1]
        self.dtype: type[np.floating[Any]] = np.float32
        self.tolerance = TOLERANCE
        self.classes, self.codes = np.unique(y, return_inverse=True)
        weights = np.ones(len(y)) if weight is None else weight.astype(np.float64)
        self.total = float(weights.sum())
        self.shares = weights / self.total  # (n,)
        self.spectrum = find_spectrum(rows)

    def in_float64(self) -> Loss:
        """Return the same loss with products in float64, to be minimised to `FINAL_TOLERANCE`."""
        found = copy.copy(self)
        found.dtype, found.tolerance = np.float64, FINAL_TOLERANCE
        found.rows = RowBlocks(self.rows) if isinstance(self.rows, np.ndarray) else self.rows
        return found

    def start(self) -> Float64Array:
        """Return the optimum for C = 0: no weights, and the logarithms of the class shares as intercepts."""
        logs = np.log(np.bincount(self.codes, self.shares))
        intercepts = logs[1:] - logs[:1] if len(logs) == 2 else logs - logs.mean()
        return np.hstack([np.zeros((len(intercepts), self.dim)), intercepts[:, None]])

    def hyperplanes(self, weights: Float64Array) -> tuple[Float64Array, Float64Array]:
        """Return coefficients (k, d) and intercepts (k,) for rows that are not centred."""
        return weights[:, :-1].copy(), weights[:, -1] - weights[:, :-1] @ self.spectrum.mean

    def scores(self, rows: Matrix, weights: Float64Array) -> Float64Array:
        """Return the scores (m, K) of `rows` (m, d)."""
        coefficients, intercepts = self.hyperplanes(weights)
        scores = (rows @ coefficients.T.astype(self.dtype)).astype(np.float64) + intercepts
        return np.hstack([np.zeros_like(scores), scores]) if len(self.classes) == 2 else scores

    def value_and_gradient(self, weights: Float64Array, penalty: float) -> tuple[float, Float64Array]:
        """Return the loss and its derivative by `weights`."""

        def part(where: slice, rows: Matrix) -> tuple[float, Float64Array, FloatArray]:
            codes, shares = self.codes[where], self.shares[where]
            scores = self.scores(rows, weights)
            scores -= scores.max(axis=1, keepdims=True)
            numbers = np.arange(len(scores))
            right = scores[numbers, codes]
            odds = np.exp(scores, out=scores)
            sums = odds.sum(axis=1)
            value = float((np.log(sums) - right) @ shares)
            odds *= (shares / sums)[:, None]
            odds[numbers, codes] -= shares
            off = odds[:, -len(weights) :]  # (n, k)
            return value, off.sum(axis=0), (off.T.astype(self.dtype) @ rows).astype(np.float64)

        value, by_intercepts, by_coefficients = sum_blocks(part, self.rows)
        value += penalty / 2 * float(np.sum(weights[:, :-1] ** 2))
        by_coefficients = by_coefficients - np.outer(by_intercepts, self.spectrum.mean)
        return value, np.hstack([by_coefficients + penalty * weights[:, :-1], by_intercepts[:, None]])

    def curvature_and_entropy(self, weights: Float64Array) -> tuple[Float64Array, float]:
        """Return the curvature of the loss per unit of the rows' variance, (1,), and the loss without its penalty."""

        def part(where: slice, rows: Matrix) -> tuple[float, float]:
            codes, shares = self.codes[where], self.shares[where]
            logs = log_softmax(self.scores(rows, weights), axis=1)
            doubt = 1 - np.sum(np.exp(2 * logs), axis=1)
            return float(doubt @ shares), -float(logs[np.arange(len(logs)), codes] @ shares)

        doubt, entropy = sum_blocks(part, self.rows)
        return np.atleast_1d(doubt / len(self.classes)), entropy

    def minimise(self, c: float, start: Float64Array, *, relative: bool) -> tuple[Float64Array, int, bool]:
        """Return the optimal weights for C = `c`, the number of steps from `start`, and whether it converged."""
        penalty = 1 / (c * self.total)
        curvature, entropy = self.curvature_and_entropy(start)
        left = self.tolerance * (min(1, entropy) if relative else 1)
        units = self.spectrum.units(curvature, penalty)

        def objective(flat: Float64Array) -> tuple[float, Float64Array]:
            value, gradient = self.value_and_gradient(units.apply(flat.reshape(start.shape)), penalty)
            return value, units.apply(gradient).ravel()

        options = {"maxiter": MOST_ITERATIONS, "gtol": math.sqrt(2 * left), "ftol": left / 10, "maxls": 50}
        begin = units.inverse().apply(start)
        found = minimize(objective, begin.ravel(), jac=True, method="L-BFGS-B", options=options)
        return units.apply(found.x.reshape(start.shape)), int(found.nit), found.nit < MOST_ITERATIONS


def follow(loss: Loss, values: Sequence[float], *, relative: bool) -> Iterator[tuple[Float64Array, int, bool]]:
    """Minimise for one value of C after another; each starts on the line through the last two optima.

    With C evenly spaced in the logarithm, weights change steadily, so this takes half the steps of a start from the
    last optimum (a predictor-corrector path; Allgower and Georg 1990).
    """
    weights, before = loss.start(), None
    for c in values:
        start = weights if before is None else 2 * weights - before
        before = weights
        weights, steps, converged = loss.minimise(c, start, relative=relative)
        yield weights, steps, converged


def find_optimum(loss: Loss, c: float) -> tuple[Float64Array, int, bool]:
    """Return the optimal weights for C = `c` to `FINAL_TOLERANCE`, the number of steps, and whether it converged.

    For C above 1 this goes up in factors of ten. Starting from the class shares would end far from the optimum, because
    the loss is nearly flat once the classes are separated.
    """
    weights, steps, _ = deque(follow(loss, decades(c), relative=True), maxlen=1).pop()
    weights, more, converged = loss.in_float64().minimise(c, weights, relative=True)
    return weights, steps + more, converged
