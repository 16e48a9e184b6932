"""One head on one layer and split, from raw features to its score on test: the unit that runs in parallel.

`prepare` runs in the parent, once for all heads that want the same rows, and `run_trial` in a worker, to which joblib
hands the arrays as memory maps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.pipeline import Pipeline
from threadpoolctl import threadpool_limits

from pipeline.arrays import Float32Array, IntArray
from pipeline.evaluation.folds import stratified_folds
from pipeline.evaluation.splits import Splits
from pipeline.heads.choose import Choice, Fold, Scaled, make_fold, scale, search, train_final
from pipeline.heads.family import Params
from pipeline.heads.registry import Head

MOST_FOLDS = 5


@dataclass(frozen=True, eq=False)
class Prepared:
    """Scaled rows of one layer and split.

    Parameters
    ----------
    folds : tuple of Fold
        To choose parameters on.
    final : Scaled
        Train and val rows, and test rows held out.
    y : (n,) int64
        Labels of train and val.
    seconds : float
        Time spent preparing.
    """

    folds: tuple[Fold, ...]
    final: Scaled
    y: IntArray
    seconds: float


@dataclass(frozen=True, eq=False)
class Outcome:
    """What came of a trial.

    Parameters
    ----------
    choice : Choice
    params : dict
        Of the final model.
    converged : bool
        Whether the final model's solver stopped by its tolerance.
    y_pred : (m,) int64
        On test.
    probabilities : (m, K) float64 or None
        Of all classes, where the head has probabilities.
    seconds : float
        Of preparing (all of it, also where other heads shared it), search, final training and test.
    pipeline : Pipeline or None
        Scaler and classifier, where asked for.
    """

    choice: Choice
    params: Params
    converged: bool
    y_pred: IntArray
    probabilities: NDArray[np.float64] | None
    seconds: float
    pipeline: Pipeline | None


def prepare(
    features: Callable[[IntArray], Float32Array],
    labels: IntArray,
    splits: Splits,
    scaling: str,
    *,
    rotated: bool,
    seed: int,
) -> Prepared:
    """Read, scale and rotate the rows of a split.

    Parameters
    ----------
    features : callable
        Maps row numbers (k,) to a fresh array (k, d) of float32.
    labels : (n,) int64
        Of all rows.
    splits : Splits
        Without a val part, parameters are chosen on stratified folds of train: five, or as many as the largest class
        has rows; on none where there is one row a class. Groups and equal images stay on one side.
    scaling : str
        One of `pipeline.heads.registry.SCALINGS`.
    rotated : bool
        Whether rows may be rotated onto their span.
    seed : int
        Draws the folds.
    """
    began = time.perf_counter()
    train, val, test = splits.train, splits.val, splits.test
    if val.size:
        pairs = [(train, val)]
    else:
        count = min(MOST_FOLDS, int(np.bincount(labels[train]).max()))
        folded = stratified_folds(labels[train], splits.units[train], count, seed) if count > 1 else []
        pairs = [(train[a], train[b]) for a, b in folded]
    folds = tuple(
        make_fold(scale(scaling, features(a), features(b), rotated=rotated), labels[a], labels[b]) for a, b in pairs
    )
    known = np.concatenate([train, val])
    final = scale(scaling, features(known), features(test), rotated=rotated)
    return Prepared(folds, final, labels[known], time.perf_counter() - began)


def run_trial(head: Head, rows: Prepared, n_classes: int, *, balanced: bool, keep: bool) -> Outcome:
    """Choose parameters, train on train and val, predict test; on one BLAS thread.

    Parameters
    ----------
    head : Head
    rows : Prepared
    n_classes : int
        Number of classes, K; labels are below it.
    balanced : bool
        Whether every class counts alike.
    keep : bool
        Whether to hand back the model.
    """
    began = time.perf_counter()
    with threadpool_limits(1):
        choice = search(head, rows.folds, balanced=balanced)
        estimator, params, converged = train_final(head, choice.params, rows.final, rows.y, balanced=balanced)
        y_pred = np.asarray(estimator.predict(rows.final.held), np.int64)
        probabilities = None
        if head.family.probabilities:
            probabilities = np.zeros((len(y_pred), n_classes))
            probabilities[:, estimator.classes_] = estimator.predict_proba(rows.final.held)
    return Outcome(
        choice,
        params,
        converged,
        y_pred,
        probabilities,
        rows.seconds + time.perf_counter() - began,
        _as_pipeline(rows.final, estimator) if keep else None,
    )


def _as_pipeline(scaled: Scaled, estimator: object) -> Pipeline:
    steps = [] if scaled.scaler is None else [("scaler", scaled.scaler)]
    return Pipeline([*steps, ("classifier", estimator)])
