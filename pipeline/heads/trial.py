"""One head on one split of a layer, from raw features to test predictions: the unit that runs in parallel.

`prepare` runs in the parent process, once for all heads that need the same rows. `run_trial` runs in a worker, to which
joblib passes the arrays as memory maps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.pipeline import Pipeline
from threadpoolctl import threadpool_limits

from pipeline.arrays import Float32Array, Float64Array, IntArray
from pipeline.evaluation.folds import stratified_folds
from pipeline.evaluation.joined import JoinedColumns
from pipeline.evaluation.split_layers import SplitLayer
from pipeline.evaluation.splits import Splits
from pipeline.heads.choose import (
    Choice,
    Fold,
    Scaled,
    default_threshold,
    make_fold,
    scale,
    search,
    train_final,
)
from pipeline.heads.family import Family, Params
from pipeline.heads.registry import Head
from pipeline.heads.solvers.blocks import by_blocks
from pipeline.options import CLASSIFICATION, MULTILABEL, REGRESSION

MOST_FOLDS = 5
FEWEST_FOLDS = {"l2": 3, "standard": 2, "none": 2}
"""By scaling. With two rows a class each fold would learn from one: on rows of length 1 fixed parameters are better."""

MOST_SCORES = 1 << 27
"""Scores of test rows that are kept of heads without probabilities: 1 GiB of float64."""


class Trial(NamedTuple):
    """One head to train on one split of a layer."""

    data: SplitLayer
    head: Head


@dataclass(frozen=True, eq=False)
class Prepared:
    """Scaled rows of one split of a layer.

    Parameters
    ----------
    own_folds : tuple of Fold
        To choose parameters on, unless `n_train` says where they stand in `final`.
    final : Scaled
        Train and val rows to train on, test rows held out.
    y : (n, ...) array
        What is to be learnt of train and val.
    seconds : float
        Time spent preparing.
    n_train : int, optional
        Parameters are chosen by training on this many rows of `final.train` and trying the others, which saves a copy
        of all rows. It needs a scaling that has no statistics.
    """

    own_folds: tuple[Fold, ...]
    final: Scaled
    y: NDArray[Any]
    seconds: float
    n_train: int | None = None

    @property
    def folds(self) -> tuple[Fold, ...]:
        """What to choose parameters on."""
        if self.n_train is None:
            return self.own_folds
        train, val = slice(self.n_train), slice(self.n_train, None)
        return (Fold(self.final.train[train], self.y[train], self.final.train[val], self.y[val]),)


@dataclass(frozen=True, eq=False)
class TrialOutcome:
    """The choice, test predictions and model of one trial.

    Parameters
    ----------
    choice : Choice
    params : dict
        Parameters of the final model.
    converged : bool
        Whether the final model's solver stopped by its tolerance.
    y_pred : (m, ...) array
        Class numbers, labels or numbers of the test rows.
    probabilities : (m, K) float64 or None
        Of all classes or labels; None for heads without probabilities.
    scores : (m, K) float64 or None
        Of all classes or labels, for heads without probabilities; minus infinity for classes without a training row.
        None if there are more than `MOST_SCORES`.
    thresholds : (K,) float64 or None
        Scores or probabilities from which on each of several labels is predicted.
    seconds : float
        For preparation (all of it, even if other heads shared it), search, final training and test.
    pipeline : Pipeline or None
        Scaler and classifier, if asked for.
    """

    choice: Choice
    params: Params
    converged: bool
    y_pred: NDArray[Any]
    probabilities: NDArray[np.float64] | None
    scores: NDArray[np.float64] | None
    thresholds: Float64Array | None
    seconds: float
    pipeline: Pipeline | None


def prepare_trial(
    features: Callable[[IntArray], Float32Array],
    y: NDArray[Any],
    labels: IntArray,
    splits: Splits,
    scaling: str,
    *,
    rotated: bool,
    seed: int,
    dims: Sequence[int] = (),
    joined: JoinedColumns | None = None,
) -> Prepared:
    """Read and scale the rows of a split.

    Parameters
    ----------
    features : callable
        Maps row numbers (k,) to a fresh array (k, d) of float32, or to `StreamedRows` of them.
    y : (n, ...) array
        What heads learn of all rows.
    labels : (n,) int64
        What folds are stratified by; `y` if that is classes.
    splits : Splits
        If val is empty, parameters are chosen on stratified folds of train: five, or as many as the largest class has
        rows, or none if these are fewer than `FEWEST_FOLDS`. Groups and equal images stay together.
    scaling : str
        One of `pipeline.heads.registry.SCALINGS`.
    rotated : bool
        Whether to rotate wide rows onto their span.
    seed : int
        Draws the folds.
    dims : sequence of int, optional
        Number of features of each layer that a row joins.
    joined : JoinedColumns, optional
        Columns that stand behind these features.
    """
    began = time.perf_counter()
    train, val, test = splits.train, splits.val, splits.test
    if val.size:
        pairs = [(train, val)]
    else:
        count = min(MOST_FOLDS, int(np.bincount(labels[train]).max()) if y is labels else len(train))
        folded = (
            stratified_folds(labels[train], splits.units[train], count, seed) if count >= FEWEST_FOLDS[scaling] else []
        )
        pairs = [(train[a], train[b]) for a, b in folded]

    def scaled(a: IntArray, b: IntArray) -> Scaled:
        moments = None if joined is None else joined.moments(a)
        return scale(scaling, features(a), features(b), rotated=rotated, dims=dims, joined=moments)

    shared = bool(val.size) and not rotated and not has_statistics(scaling, joined)
    folds = () if shared else tuple(make_fold(scaled(a, b), y[a], y[b]) for a, b in pairs)
    known = np.concatenate([train, val])
    final = scaled(known, test)
    return Prepared(folds, final, y[known], time.perf_counter() - began, len(train) if shared else None)


def has_statistics(scaling: str, joined: JoinedColumns | None) -> bool:
    """Tell whether rows are scaled by what other rows are, so that each fold needs rows of its own."""
    return scaling == "standard" or joined is not None


def run_trial(
    head: Head,
    rows: Prepared,
    n_classes: int,
    *,
    balanced: bool,
    metric: str,
    keep: bool,
    task: str = CLASSIFICATION,
) -> TrialOutcome:
    """Choose parameters, train on train and val, predict test; on one BLAS thread."""
    began = time.perf_counter()
    with threadpool_limits(1):
        choice = search(head, rows.folds, balanced=balanced, metric=metric, task=task)
        estimator, params, converged = train_final(head, choice.params, rows.final, rows.y, balanced=balanced)
        thresholds = choice.thresholds
        if task == MULTILABEL and thresholds is None:
            thresholds = np.full(n_classes, default_threshold(head.family))
        y_pred, scores = _predict(head.family, estimator, rows.final.held, n_classes, task, thresholds)
    certain = head.family.probabilities
    return TrialOutcome(
        choice,
        params,
        converged,
        y_pred,
        scores if certain else None,
        None if certain else scores,
        thresholds,
        rows.seconds + time.perf_counter() - began,
        _as_pipeline(rows.final, estimator) if keep else None,
    )


def _predict(
    family: Family, estimator: Any, held: Float32Array, n_classes: int, task: str, thresholds: Float64Array | None
) -> tuple[NDArray[Any], Float64Array | None]:
    """Return what is predicted of held-out rows (m, ...), and the scores (m, K) behind it."""
    if task == REGRESSION:
        return np.asarray(by_blocks(estimator.predict, held), np.float64), None
    if thresholds is not None:
        scores = by_blocks(partial(family.scores, estimator), held)
        return scores >= thresholds, scores
    y_pred = np.asarray(by_blocks(estimator.predict, held), np.int64)
    if not family.probabilities and len(y_pred) * n_classes > MOST_SCORES:
        return y_pred, None
    scores = np.full((len(y_pred), n_classes), 0.0 if family.probabilities else -np.inf)
    scores[:, estimator.classes_] = by_blocks(partial(family.scores, estimator), held)
    return y_pred, scores


def _as_pipeline(scaled: Scaled, estimator: object) -> Pipeline:
    steps = [] if scaled.scaler is None else [("scaler", scaled.scaler)]
    return Pipeline([*steps, ("classifier", estimator)])
