"""Probabilities of every row from a head that has not seen it."""

from __future__ import annotations

from collections.abc import Callable

import joblib
import numpy as np
from threadpoolctl import threadpool_limits

from pipeline.arrays import Float32Array, Float64Array, IntArray
from pipeline.errors import FitError
from pipeline.evaluation.calibration import tempered, useful_temperature
from pipeline.evaluation.folds import stratified_folds
from pipeline.evaluation.splits import hold_out_val
from pipeline.heads.choose import make_fold, scale, search, train_final
from pipeline.heads.family import Params
from pipeline.heads.registry import Head

FOLDS = 5
MOST_SEARCHED = 10_000
"""Training rows on which parameters are chosen; of more, a stratified part is drawn."""

Reader = Callable[[IntArray], Float32Array]
"""Maps row numbers (k,) to a fresh array (k, d)."""


def choose_params(features: Reader, labels: IntArray, units: IntArray, head: Head, seed: int) -> Params:
    """Choose parameters on a part of the rows that is held out, once for all folds.

    Raises
    ------
    FitError
        The head has no probabilities, or the labels are of a single class.
    """
    if not head.family.probabilities:
        raise FitError(f"{head.name} gives no probabilities, which tell wrong labels; use logreg or knn")
    if len(np.unique(labels)) < 2:
        raise FitError("expected labels of at least two classes; with a single class, none can be wrong")
    parts = max(1, -(-len(labels) // MOST_SEARCHED))
    folds = stratified_folds(labels, units, parts, seed) if parts > 1 else []
    drawn = folds[0][1] if folds else np.arange(len(labels))
    train, val = hold_out_val(drawn, labels, units, np.random.default_rng(seed))
    if not len(val):
        return head.fixed
    rotated = head.family.linear and features(train[:1]).shape[1] > len(train)
    with threadpool_limits(1):
        scaled = scale(head.scaling, features(train), features(val), rotated=rotated)
        return search(head, [make_fold(scaled, labels[train], labels[val])]).params


def out_of_fold(
    features: Reader,
    labels: IntArray,
    units: IntArray,
    n_classes: int,
    head: Head,
    params: Params,
    seed: int,
    done: Callable[[], None],
) -> Float64Array:
    """Return calibrated probabilities (n, n_classes) of rows, each by a head trained on the other folds.

    Parameters
    ----------
    features : callable
        See `Reader`.
    labels : (n,) int64
    units : (n,) int64
        Rows of equal number are in one fold.
    n_classes : int
    head : Head
    params : dict
        Of the head.
    seed : int
        Draws the folds.
    done : callable
        Called after each fold.

    Raises
    ------
    FitError
        The rows do not allow folds.
    """
    folds = stratified_folds(labels, units, min(FOLDS, len(np.unique(units))), seed)
    if sum(len(held) for _, held in folds) < len(labels):
        raise FitError(
            f"cannot make folds of {len(labels)} rows in {len(np.unique(units))} independent groups: outside each fold "
            "there must be images of two classes; if near-duplicates join nearly all, use a higher threshold"
        )

    def fit(train: IntArray, held: IntArray) -> Float64Array:
        rotated = head.family.linear and features(train[:1]).shape[1] > len(train)
        scaled = scale(head.scaling, features(train), features(held), rotated=rotated)
        estimator = train_final(head, params, scaled, labels[train]).estimator
        found = np.zeros((len(held), n_classes))
        found[:, estimator.classes_] = head.family.predict_proba(estimator, scaled.held)
        done()
        return found

    probabilities = np.zeros((len(labels), n_classes))
    with threadpool_limits(1):
        workers = joblib.Parallel(min(len(folds), joblib.cpu_count()), prefer="threads")
        for (_, held), found in zip(folds, workers(joblib.delayed(fit)(*fold) for fold in folds), strict=True):
            probabilities[held] = found
    temperature = useful_temperature(probabilities, labels)
    return probabilities if temperature is None else tempered(probabilities, temperature)
