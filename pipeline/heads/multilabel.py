"""Heads for several labels at once: one hyperplane, or one vote, for each label, with the same parameter for all.

Here `y` is (n, K) bool, and so is what a `Step` predicts; scores and probabilities are (n, K), of each label by itself.
A label that all training rows have, or none, gets a hyperplane without weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import LabelBinarizer
from sklearn.svm import LinearSVC

from pipeline.arrays import BoolArray, Float32Array, Float64Array, FloatArray
from pipeline.evaluation.multilabel import EVEN
from pipeline.heads.family import Family, Fitted, Params, Step, Weights
from pipeline.heads.knn import Knn, inverse_distances, nearest_first
from pipeline.heads.linear import LinearFamily
from pipeline.heads.linear_svm import LinearSvm, follow_margins, separate
from pipeline.heads.logreg import Logreg, Loss, Matrix, find_optimum, follow, on_device
from pipeline.heads.ridge import Ridge, follow_squares, solve_streamed
from pipeline.heads.solvers.blocks import StreamedRows, sum_blocks
from pipeline.heads.solvers.hyperplanes import Hyperplanes


class _OfLabels(LinearFamily):
    """A hyperplane for each label, of rows that weigh alike."""

    weighted = False

    def hyperplanes(self, estimator: Any) -> Hyperplanes:
        """Return the coefficients (K, d) and intercepts (K,) of all labels."""
        parts = getattr(estimator, "estimators_", [estimator])
        return Hyperplanes(
            np.vstack([one.coef_ for one in parts]), np.concatenate([np.atleast_1d(one.intercept_) for one in parts])
        )


class LabelsLogreg(_OfLabels, Logreg):
    """A binary logistic regression for each label, all with the same C."""

    def on_device(self, device: str) -> Family:
        """Return this family with products computed on `device`."""
        return LabelsLogreg(device)

    def path(
        self, grid: Sequence[Params], train: Float32Array, y: NDArray[Any], held: Float32Array, weight: Weights = None
    ) -> Iterator[Step]:
        """Yield a `Step` for each candidate."""
        loss, held_rows = _LabelsLoss(train, y, weight, self.device), on_device(self.device, held)
        for weights, _, converged in follow(loss, [params["C"] for params in grid], relative=False):
            chances = expit(loss.scores(held_rows, weights))
            yield Step(chances >= EVEN, converged, chances)

    def fit(self, params: Params, train: Float32Array, y: NDArray[Any], weight: Weights = None) -> Fitted:
        """Train and store the optimum in a `OneVsRestClassifier` of `LogisticRegression`."""
        loss = _LabelsLoss(train, y, weight, self.device)
        weights, steps, converged = find_optimum(loss, params["C"])
        made = one_for_each(LogisticRegression(**params), y, *loss.hyperplanes(weights))
        for one in made.estimators_:
            one.n_iter_ = np.array([steps])
        return Fitted(made, params, converged)


class _LabelsLoss(Loss):
    """The sum over labels of mean binary cross-entropies; weights are (K, d + 1)."""

    def __init__(self, rows: Float32Array, y: BoolArray, weight: Weights, device: str | None) -> None:
        super().__init__(rows, np.zeros(len(rows), np.int64), weight, device)
        self.targets = y.astype(np.float64)

    def start(self) -> Float64Array:
        """Return no weights, and intercepts for the share of each label, never 0 or 1."""
        n = len(self.targets)
        shares = (self.targets.sum(axis=0) + 0.5) / (n + 1)
        return np.hstack([np.zeros((len(shares), self.dim)), logit(shares)[:, None]])

    def curvature_and_entropy(self, weights: Float64Array) -> tuple[Float64Array, float]:
        """Return the curvature (K, 1) of each label's loss, and their sum without penalty."""

        def part(where: slice, rows: Matrix) -> tuple[Float64Array, float]:
            scores = self.scores(rows, weights)
            chances = expit(scores)
            return self.shares[where] @ (chances * (1 - chances)), self._entropy(where, scores)

        curvature, entropy = sum_blocks(part, self.rows)
        return curvature[:, None], entropy

    def value_and_gradient(self, weights: Float64Array, penalty: float) -> tuple[float, Float64Array]:
        """Return the loss and its derivative by `weights`."""

        def part(where: slice, rows: Matrix) -> tuple[float, Float64Array, FloatArray]:
            scores = self.scores(rows, weights)
            off = (expit(scores) - self.targets[where]) * self.shares[where, None]
            by_coefficients = (off.T.astype(self.dtype) @ rows).astype(np.float64)
            return self._entropy(where, scores), off.sum(axis=0), by_coefficients

        value, by_intercepts, by_coefficients = sum_blocks(part, self.rows)
        value += penalty / 2 * float(np.sum(weights[:, :-1] ** 2))
        by_coefficients = by_coefficients - np.outer(by_intercepts, self.spectrum.mean)
        return value, np.hstack([by_coefficients + penalty * weights[:, :-1], by_intercepts[:, None]])

    def _entropy(self, where: slice, scores: Float64Array) -> float:
        """Return the share of some rows in the loss, by their scores."""
        return float(self.shares[where] @ (np.logaddexp(0, scores) - self.targets[where] * scores).sum(axis=1))


class LabelsSvm(_OfLabels, LinearSvm):
    """A binary linear SVM with squared hinge loss for each label, all with the same C."""

    def path(
        self, grid: Sequence[Params], train: Float32Array, y: NDArray[Any], held: Float32Array, weight: Weights = None
    ) -> Iterator[Step]:
        """Yield a `Step` for each candidate."""
        for scores, converged in follow_margins(grid, train, _signs(y), held, weight):
            yield Step(scores > 0, converged, scores=partial(np.asarray, scores))

    def fit(self, params: Params, train: Float32Array, y: NDArray[Any], weight: Weights = None) -> Fitted:
        """Train and store the optimum in a `OneVsRestClassifier` of `LinearSVC`."""
        weights, converged = separate(params, train, _signs(y), weight)
        return Fitted(one_for_each(LinearSVC(**params), y, weights[:, :-1], weights[:, -1]), params, converged)


class LabelsRidge(_OfLabels, Ridge):
    """Least squares on -1 and 1 for each label, all with the same alpha, which is 1 / C."""

    def path(
        self, grid: Sequence[Params], train: Float32Array, y: NDArray[Any], held: Float32Array, weight: Weights = None
    ) -> Iterator[Step]:
        """Yield a `Step` for each candidate."""
        for scores in follow_squares([params["alpha"] for params in grid], train, _signs(y), held, weight):
            yield Step(scores > 0, converged=True, scores=partial(np.asarray, scores))

    def fit(self, params: Params, train: Float32Array, y: NDArray[Any], weight: Weights = None) -> Fitted:
        """Train a `RidgeClassifier`, which takes several labels at once."""
        model = RidgeClassifier(solver="svd", **params)
        if isinstance(train, StreamedRows):
            solve_streamed(model, train, np.arange(2)[:, None].repeat(y.shape[1], axis=1), _signs(y))
        else:
            model.fit(train.astype(np.float64), y.astype(np.int64), weight)
        return Fitted(model, params, converged=True)


class LabelsKnn(Knn):
    """Scikit-learn's `KNeighborsClassifier` for several labels, with ``weights="distance"``.

    The probability of a label is its share of the votes after one more vote that is half for it.
    """

    def path(
        self, grid: Sequence[Params], train: Float32Array, y: NDArray[Any], held: Float32Array, weight: Weights = None
    ) -> Iterator[Step]:
        """Yield a `Step` for each candidate, all from one list of neighbours."""
        distances, neighbours = nearest_first(train, held, max(params["k"] for params in grid))
        for params in grid:
            k = params["k"]
            weights = inverse_distances(distances[:, :k])
            shares = np.einsum("mk,mkl->ml", weights, y[neighbours[:, :k]]) / weights.sum(axis=1, keepdims=True)
            chances = _smooth(shares, k)
            yield Step(chances >= EVEN, converged=True, probabilities=chances)

    def fit(self, params: Params, train: Float32Array, y: NDArray[Any], weight: Weights = None) -> Fitted:
        """Keep the rows in a `KNeighborsClassifier`."""
        model = KNeighborsClassifier(params["k"], metric="cosine", algorithm="brute", weights="distance")
        return Fitted(model.fit(train, y.astype(np.int64)), params, converged=True)

    def predict_proba(self, estimator: Any, rows: Float32Array) -> Float64Array:
        """Return smoothed shares (n, K); scikit-learn gives a table for each label, with a column for each value."""
        tables = zip(estimator.predict_proba(rows), estimator.classes_, strict=True)
        shares = np.column_stack([table @ (values == 1) for table, values in tables])
        return _smooth(shares, estimator.n_neighbors)


def one_for_each(model: Any, y: BoolArray, coefficients: Float64Array, intercepts: Float64Array) -> OneVsRestClassifier:
    """Return hyperplanes (K, d) and (K,) as a fitted `OneVsRestClassifier` with a `model` for each label."""
    made = OneVsRestClassifier(model)
    made.label_binarizer_ = LabelBinarizer(sparse_output=True).fit(y.astype(np.int64))
    made.n_features_in_ = coefficients.shape[1]
    made.estimators_ = []
    for weights, intercept in zip(coefficients, intercepts, strict=True):
        one = type(model)(**model.get_params())
        one.classes_, one.n_features_in_ = np.arange(2), made.n_features_in_
        one.coef_, one.intercept_ = weights[None].copy(), np.array([intercept])
        made.estimators_.append(one)
    return made


def _signs(y: BoolArray) -> Float32Array:
    return np.where(y, np.float32(1), np.float32(-1))


def _smooth(shares: Float64Array, k: int) -> Float64Array:
    return np.asarray((k * shares + EVEN) / (k + 1))
