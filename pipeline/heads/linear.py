"""Heads that are one hyperplane a class: logistic regression, linear SVM, ridge.

Their regularisation is searched on the grid of Kornblith et al. (2019, "Do better ImageNet models transfer better?"):
45 values of C from 1e-6 to 1e5, evenly spaced in the logarithm.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, cast

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.svm import LinearSVC

from pipeline.heads.family import Family, Fitted, Floats, Ints, Params, Step

C_GRID = tuple(float(c) for c in np.logspace(-6, 5, 45))
MOST_ITERATIONS = 1000
TOLERANCE = 1e-6
"""On the gradient of the mean loss. Where rows can be told apart that loss gets tiny, and scikit-learn's 1e-4 stops a
warm start before it moves, which changed the choice of C; at 1e-6 it is that of float64 at 1e-8."""
HINGE_TOLERANCE = 1e-5


class Logreg(Family):
    """Multinomial logistic regression with an l2 penalty, warm-started upwards in C."""

    linear = True
    probabilities = True
    fixed: ClassVar[Params] = {"C": 1.0}

    def grid(self, n_rows: int) -> Sequence[Params]:
        """Return the 45 values of C."""
        return [{"C": c} for c in C_GRID]

    def path(self, grid: Sequence[Params], train: Floats, y: Ints, held: Floats) -> Iterator[Step]:
        """Yield a `Step` for each candidate, each started where the last one ended."""
        model = LogisticRegression(tol=TOLERANCE, max_iter=MOST_ITERATIONS, warm_start=True)
        for params in grid:
            converged = _fit_noting_convergence(model.set_params(**params), train, y)
            yield Step(model.predict(held), bool((model.predict(train) == y).all()), converged)

    def fit(self, params: Params, train: Floats, y: Ints) -> Fitted:
        """Train from zero; weights are kept in float64, so that a small probability does not become none."""
        model = LogisticRegression(tol=TOLERANCE, max_iter=MOST_ITERATIONS, **params)
        converged = _fit_noting_convergence(model, train, y)
        model.coef_ = model.coef_.astype(np.float64)
        model.intercept_ = model.intercept_.astype(np.float64)
        return Fitted(model, params, converged)


class LinearSvm(Family):
    """Scikit-learn's `LinearSVC`: squared hinge loss, one class against the rest, penalised intercept.

    liblinear cannot start from a neighbour's solution and slows down with C. The objective is smooth and strictly
    convex, so the same optimum is found here by L-BFGS over all classes at once, warm-started upwards in C.
    """

    linear = True
    fixed: ClassVar[Params] = {"C": 1.0}

    def grid(self, n_rows: int) -> Sequence[Params]:
        """Return the 45 values of C."""
        return [{"C": c} for c in C_GRID]

    def path(self, grid: Sequence[Params], train: Floats, y: Ints, held: Floats) -> Iterator[Step]:
        """Yield a `Step` for each candidate, each started where the last one ended."""
        classes, signs = _one_against_rest(y)
        rows, held_rows = _with_ones(train), _with_ones(held)
        weights = np.zeros((signs.shape[1], rows.shape[1]))
        for params in grid:
            weights, converged = _squared_hinge(rows, signs, params["C"], weights)
            right = _choose(classes, rows @ weights.T) == y
            yield Step(_choose(classes, held_rows @ weights.T), bool(right.all()), converged)

    def fit(self, params: Params, train: Floats, y: Ints) -> Fitted:
        """Train from zero and hand the optimum to a `LinearSVC`."""
        classes, signs = _one_against_rest(y)
        rows = _with_ones(train)
        weights, converged = _squared_hinge(rows, signs, params["C"], np.zeros((signs.shape[1], rows.shape[1])))
        model = LinearSVC(**params)
        model.classes_, model.n_features_in_ = classes, train.shape[1]
        model.coef_, model.intercept_ = weights[:, :-1].copy(), weights[:, -1].copy()
        return Fitted(model, params, converged)


class Ridge(Family):
    """Least squares on labels of -1 and 1 with an l2 penalty; alpha is 1 / C, all candidates from one decomposition."""

    linear = True
    fixed: ClassVar[Params] = {"alpha": 1.0}

    def grid(self, n_rows: int) -> Sequence[Params]:
        """Return 45 values of alpha from 1e6 down to 1e-5."""
        return [{"alpha": 1 / c} for c in C_GRID]

    def path(self, grid: Sequence[Params], train: Floats, y: Ints, held: Floats) -> Iterator[Step]:
        """Yield a `Step` for each candidate."""
        classes, signs = _one_against_rest(y)
        mean, middle = train.mean(axis=0, dtype=np.float64), signs.mean(axis=0)
        centred = train - mean
        values, axes = np.linalg.eigh(centred.T @ centred)
        values = np.maximum(values, 0)  # rounding
        target = axes.T @ (centred.T @ (signs - middle))
        seen, unseen = centred @ axes, (held - mean) @ axes
        for params in grid:
            weights = target / (values + params["alpha"])[:, None]
            right = _choose(classes, seen @ weights + middle) == y
            yield Step(_choose(classes, unseen @ weights + middle), bool(right.all()), converged=True)

    def fit(self, params: Params, train: Floats, y: Ints) -> Fitted:
        """Train a `RidgeClassifier`, by singular values: small alphas on wide rows are too much for Cholesky."""
        model = RidgeClassifier(solver="svd", **params).fit(train.astype(np.float64), y)
        return Fitted(model, params, converged=True)


def _fit_noting_convergence(model: Any, train: Floats, y: Ints) -> bool:
    """Fit; return whether the solver converged. Warnings of other kinds pass on."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(train, y)
    for warning in caught:
        if not issubclass(warning.category, ConvergenceWarning):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)


def _one_against_rest(y: Ints) -> tuple[Ints, Floats]:
    """Return the classes and their signs: (n, K) of -1 and 1, a single column for two classes."""
    classes = np.unique(y)
    columns = classes[1:] if len(classes) == 2 else classes
    return classes, np.where(y[:, None] == columns, np.float32(1), np.float32(-1))


def _choose(classes: Ints, scores: NDArray[np.float64]) -> Ints:
    best = (scores[:, 0] > 0).astype(np.int64) if scores.shape[1] == 1 else scores.argmax(axis=1)
    return cast("Ints", classes[best])


def _with_ones(rows: Floats) -> Floats:
    return np.hstack([rows, np.ones((len(rows), 1), np.float32)])


def _squared_hinge(
    rows: Floats, signs: Floats, c: float, start: NDArray[np.float64]
) -> tuple[NDArray[np.float64], bool]:
    """Minimise ``|w|² / 2 + c Σ max(0, 1 - s x·w)²`` over all columns of `signs`; weights (K, d), converged."""
    scale = 1 / (c * len(rows))  # of the order of the mean loss, so that one tolerance suits every c

    def objective(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        weights = flat.reshape(start.shape)
        slack = np.maximum(1 - signs * (rows @ weights.T.astype(np.float32)), 0)
        loss = 0.5 * float(flat @ flat) + c * float(np.sum(np.square(slack, dtype=np.float64)))
        gradient = weights - 2 * c * ((slack * signs).T @ rows)
        return scale * loss, scale * gradient.ravel()

    options = {"maxiter": MOST_ITERATIONS, "gtol": HINGE_TOLERANCE, "ftol": 1e-9, "maxls": 50}
    found = minimize(objective, start.ravel(), jac=True, method="L-BFGS-B", options=options)
    return found.x.reshape(start.shape), found.nit < MOST_ITERATIONS
