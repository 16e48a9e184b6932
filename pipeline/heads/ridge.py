"""Ridge: least squares on labels of -1 and 1, one hyperplane per class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import ClassVar

import numpy as np
from sklearn.linear_model import RidgeClassifier

from pipeline.arrays import Float32Array, Float64Array, FloatArray, IntArray
from pipeline.heads.family import Fitted, Params, Step, Weights
from pipeline.heads.linear import C_GRID, LinearFamily
from pipeline.heads.solvers.hyperplanes import best_classes, one_against_rest


class Ridge(LinearFamily):
    """Scikit-learn's `RidgeClassifier`; alpha is 1 / C, and one decomposition serves all candidates."""

    fixed: ClassVar[Params] = {"alpha": 1.0}
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
        """Train a `RidgeClassifier` by singular values, for Cholesky fails on wide rows with a small alpha."""
        model = RidgeClassifier(solver="svd", **params).fit(train.astype(np.float64), y, weight)
        return Fitted(model, params, converged=True)


def follow_squares(
    alphas: Sequence[float], train: Float32Array, targets: FloatArray, held: Float32Array, weight: Weights = None
) -> Iterator[Float64Array]:
    """Yield the least-squares predictions (m, K) of `targets` (n, K) for each alpha, from one decomposition."""
    weights_of_rows = np.ones((len(targets), 1)) if weight is None else weight[:, None].astype(np.float64)
    mean, middle = (np.sum(weights_of_rows * part, axis=0) / weights_of_rows.sum() for part in (train, targets))
    centred = train - mean
    weighted = weights_of_rows * centred
    values, axes = np.linalg.eigh(weighted.T @ centred)
    values = np.maximum(values, 0)  # rounding
    along = axes.T @ (weighted.T @ (targets - middle))
    unseen = (held - mean) @ axes
    for alpha in alphas:
        yield unseen @ (along / (values + alpha)[:, None]) + middle
