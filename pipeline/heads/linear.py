"""Logistic regression and ridge: one hyperplane a class."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
from sklearn import config_context
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, RidgeClassifier

from pipeline.heads.family import Family, Fitted, Floats, Ints, Params, Step
from pipeline.heads.hyperplanes import C_GRID, OverC, choose, one_against_rest

MOST_ITERATIONS = 1000
TOLERANCE = 1e-6
"""On the gradient of the mean loss. Where rows can be told apart that loss gets tiny, and scikit-learn's 1e-4 stops a
warm start before it moves, which changed the choice of C; at 1e-6 it is that of float64 at 1e-8."""


class Logreg(OverC):
    """Multinomial logistic regression with an l2 penalty, warm-started upwards in C."""

    probabilities = True

    def path(
        self, grid: Sequence[Params], train: Floats, y: Ints, held: Floats, weight: Floats | None = None
    ) -> Iterator[Step]:
        """Yield a `Step` for each candidate."""
        for model, converged in _follow(grid, train, y, weight):
            saturated = bool((model.predict(train) == y).all())
            yield Step(model.predict(held), saturated, converged, model.predict_proba(held))

    def fit(self, params: Params, train: Floats, y: Ints, weight: Floats | None = None) -> Fitted:
        """Train, in decades of C above 1; weights become float64, so that a small probability does not become none.

        There a start from the class shares ends far from the optimum: the loss is nearly flat once all rows are told
        apart.
        """
        model, converged = deque(_follow(_decades(params["C"]), train, y, weight), maxlen=1).pop()
        model.set_params(warm_start=False)
        model.coef_ = model.coef_.astype(np.float64)
        model.intercept_ = model.intercept_.astype(np.float64)
        return Fitted(model, params, converged)


def _decades(c: float) -> list[Params]:
    """Return `c` alone up to 1, and above it every value a factor of ten apart from there up to it."""
    below = max(math.ceil(math.log10(c)), 0)
    return [{"C": c / 10**power} for power in range(below, 0, -1)] + [{"C": c}]


def _follow(
    grid: Sequence[Params], train: Floats, y: Ints, weight: Floats | None
) -> Iterator[tuple[LogisticRegression, bool]]:
    """Fit one candidate after the other, each started where the line through the last two leads.

    Along an evenly spaced logarithm of C weights change steadily, so this needs half the iterations that starting where
    the last one ended does, and stays nearer to the optimum where the loss is flat (a predictor-corrector path;
    Allgower and Georg 1990). The model is the same one every time; whether its solver converged comes with it.
    """
    model = _start_from_class_shares(train, y, weight)
    before = None
    for params in grid:
        last = model.coef_, model.intercept_
        if before is not None:
            model.coef_, model.intercept_ = (2 * now - then for now, then in zip(last, before, strict=True))
        before = last
        yield model, _fit_noting_convergence(model.set_params(**params), train, y, weight)


class Ridge(Family):
    """Least squares on labels of -1 and 1 with an l2 penalty; alpha is 1 / C, all candidates from one decomposition."""

    linear = True
    weighted = True
    fixed: ClassVar[Params] = {"alpha": 1.0}

    def grid(self, n_rows: int) -> Sequence[Params]:
        """Return 45 values of alpha from 1e6 down to 1e-5."""
        return [{"alpha": 1 / c} for c in C_GRID]

    def path(
        self, grid: Sequence[Params], train: Floats, y: Ints, held: Floats, weight: Floats | None = None
    ) -> Iterator[Step]:
        """Yield a `Step` for each candidate."""
        classes, signs = one_against_rest(y)
        weights_of_rows = np.ones((len(y), 1)) if weight is None else weight[:, None].astype(np.float64)
        mean, middle = (np.sum(weights_of_rows * part, axis=0) / weights_of_rows.sum() for part in (train, signs))
        centred = train - mean
        weighted = weights_of_rows * centred
        values, axes = np.linalg.eigh(weighted.T @ centred)
        values = np.maximum(values, 0)  # rounding
        target = axes.T @ (weighted.T @ (signs - middle))
        seen, unseen = centred @ axes, (held - mean) @ axes
        for params in grid:
            weights = target / (values + params["alpha"])[:, None]
            right = choose(classes, seen @ weights + middle) == y
            yield Step(choose(classes, unseen @ weights + middle), bool(right.all()), converged=True)

    def fit(self, params: Params, train: Floats, y: Ints, weight: Floats | None = None) -> Fitted:
        """Train a `RidgeClassifier`, by singular values: small alphas on wide rows are too much for Cholesky."""
        model = RidgeClassifier(solver="svd", **params).fit(train.astype(np.float64), y, weight)
        return Fitted(model, params, converged=True)


def _start_from_class_shares(train: Floats, y: Ints, weight: Floats | None) -> LogisticRegression:
    """Return a model about to start where C = 0 has its optimum.

    From zero it would not get to the intercepts where C is small: next to the penalty they are too little to see.
    """
    _, codes = np.unique(y, return_inverse=True)
    shares = np.log(np.bincount(codes, weights=weight))
    shares -= shares.mean()
    intercept = shares if len(shares) > 2 else shares[1:] - shares[:1]
    model = LogisticRegression(tol=TOLERANCE, max_iter=MOST_ITERATIONS, warm_start=True)
    model.coef_ = np.zeros((len(intercept), train.shape[1]), np.float32)
    model.intercept_ = intercept.astype(np.float32)
    return model


def _fit_noting_convergence(model: Any, train: Floats, y: Ints, weight: Floats | None) -> bool:
    """Fit; return whether the solver converged. Warnings of other kinds pass on."""
    with warnings.catch_warnings(record=True) as caught, config_context(assume_finite=True):  # checked beforehand
        warnings.simplefilter("always")
        model.fit(train, y, weight)
    for warning in caught:
        if not issubclass(warning.category, ConvergenceWarning):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
