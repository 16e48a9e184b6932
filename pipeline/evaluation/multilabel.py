"""How good predicted labels are where an image may have several."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from pipeline.arrays import BoolArray, Float64Array, FloatArray, IntArray
from pipeline.evaluation.bootstrap import Redrawn, effective_groups, mean_known, redraw
from pipeline.evaluation.metrics import auroc, none_if_unknown
from pipeline.evaluation.predictions import Predictions, count_rows
from pipeline.options import METRICS_OF, MULTILABEL
from pipeline.results import LabelScore

SHARE = (0.0, 1.0)
"""Between which all these metrics lie."""
EVEN = 0.5
"""The probability from which on a label is predicted, unless validation rows say better."""


def average_precisions(
    y_true: BoolArray, scores: Float64Array, weights: Float64Array, folds: IntArray | None = None
) -> Float64Array:
    """Return the average precision of each label, as scikit-learn has it.

    Parameters
    ----------
    y_true : (n, K) bool
    scores : (n, K) float64
        Larger where a label is likelier.
    weights : (b, n) float
        How often each row counts in each of b test sets, whole numbers.
    folds : (n,) int64, optional
        The model that gave the scores of each row. Scores of different models do not compare, so the result is a mean
        over folds.

    Returns
    -------
    (b, K) float64
        NaN for a label that no row has, or all rows have.
    """
    if folds is not None:
        parts = [folds == fold for fold in np.unique(folds)]
        of_folds = [average_precisions(y_true[part], scores[part], weights[:, part]) for part in parts]
        return mean_known(np.stack(of_folds, axis=1))
    return np.stack(
        [_average_precision(y, score, weights) for y, score in zip(y_true.T, scores.T, strict=True)], axis=1
    )


def _average_precision(y_true: BoolArray, scores: Float64Array, weights: FloatArray) -> FloatArray:
    order = np.argsort(-scores, kind="stable")
    ranked, positive = scores[order], np.flatnonzero(y_true[order])
    ends = np.searchsorted(-ranked, -ranked[positive], "right") - 1  # of the rows with the same score
    last = np.searchsorted(positive, ends, "right") - 1
    taken = np.cumsum(weights[:, order], axis=1)
    own = weights[:, order[positive]]
    right = np.cumsum(own, axis=1)
    if not len(positive):
        return np.full(len(weights), np.nan)
    precision = right[:, last] / np.maximum(taken[:, ends], 1)
    known = (right[:, -1] > 0) & (right[:, -1] < taken[:, -1])
    return np.where(known, (own * precision).sum(axis=1) / np.where(known, right[:, -1], 1), np.nan)


def f1_counts(y_true: BoolArray, y_pred: BoolArray, weights: Float64Array) -> tuple[Float64Array, Float64Array]:
    """Return twice the right predictions of each label, and predictions plus rows that have it: (b, K) each."""
    right = weights @ (y_true & y_pred).astype(np.float64)
    return 2 * right, weights @ y_true.astype(np.float64) + weights @ y_pred.astype(np.float64)


def rate_labels(
    metric: str,
    y_true: BoolArray,
    y_pred: BoolArray,
    scores: Float64Array,
    folds: IntArray | None,
    weights: Float64Array,
) -> Float64Array:
    """Return a metric of `pipeline.options.METRICS_OF` for labels, in parts whose mean it is.

    They are (b, K), one for each label and NaN where it is not defined, or (b, 1) for ``"micro_f1"``, which counts the
    labels of all rows together. The F1 of a label is not defined if no row has it or is predicted to.
    """
    if metric == "average_precision":
        return average_precisions(y_true, scores, weights, folds)
    right, both = f1_counts(y_true, y_pred, weights)
    if metric == "micro_f1":
        right, both = (counts.sum(axis=1, keepdims=True) for counts in (right, both))
    return np.where(both > 0, right / np.where(both > 0, both, 1), np.nan)


def mean_auroc(y_true: BoolArray, scores: Float64Array, folds: IntArray | None) -> float:
    """Return the mean area under the ROC curve over labels, of each over folds as in `average_precisions`."""
    parts = [np.arange(len(y_true))] if folds is None else [np.flatnonzero(folds == fold) for fold in np.unique(folds)]
    found = [
        [auroc(own[part].astype(np.int64), np.column_stack([-said[part], said[part]])) for part in parts]
        for own, said in zip(y_true.T, scores.T, strict=True)
    ]  # (K, folds)
    return float(mean_known(mean_known(np.array(found))[None])[0])


def best_thresholds(y_true: BoolArray, scores: Float64Array, default: float) -> Float64Array:
    """Return for each label (K,) the least score from which on predicting it gives the highest F1.

    A label that none of the rows has keeps the default. Thresholds lie halfway between two scores.
    """
    found = np.full(y_true.shape[1], default)
    for label, (y, score) in enumerate(zip(y_true.T, scores.T, strict=True)):
        if not y.any():
            continue
        order = np.argsort(-score, kind="stable")
        ranked = score[order]
        f1 = 2 * np.cumsum(y[order]) / (np.arange(1, len(y) + 1) + y.sum())
        f1[:-1][ranked[:-1] == ranked[1:]] = -1  # cannot be cut between equal scores
        last = int(np.argmax(f1))
        found[label] = ranked[last] if last + 1 == len(y) else (ranked[last] + ranked[last + 1]) / 2
    return found


def scores_of(predictions: Predictions) -> Float64Array:
    """Return the scores (n, K) of predicted labels: probabilities, or else distances from hyperplanes."""
    found = predictions.scores if predictions.probabilities is None else predictions.probabilities
    return np.asarray(found)


def redraw_labels(metric: str, of_seeds: Sequence[Predictions]) -> Redrawn:
    """Return a metric of predicted labels, or its mean over seeds, and what other test sets might give."""
    statistics = [partial(rate_labels, metric, one.y_true, one.y_pred, scores_of(one), one.folds) for one in of_seeds]
    telling = [_telling(metric, one) for one in of_seeds]
    return redraw(statistics, [one.units for one in of_seeds], telling, SHARE)


def _telling(metric: str, predictions: Predictions) -> Float64Array:
    """Return how many groups of rows tell each part of a metric; see `Redrawn`."""
    units, labels = predictions.units, predictions.y_true.T
    if metric == "micro_f1":
        return np.array([effective_groups(units)])
    return np.array([min(effective_groups(units[own]), effective_groups(units[~own])) for own in labels])


def measure_labels(predictions: Predictions, names: tuple[str, ...], thresholds: Float64Array) -> dict[str, Any]:
    """Return the keys of a `MultilabelResult` that measure predictions."""
    y_true, scores = predictions.y_true, scores_of(predictions)
    found: dict[str, Any] = {
        **count_rows(predictions),
        "auroc": none_if_unknown(mean_auroc(y_true, scores, predictions.folds)),
    }
    redrawn = {metric: redraw_labels(metric, [predictions]) for metric in METRICS_OF[MULTILABEL]}
    for metric, of_metric in redrawn.items():
        found |= {metric: none_if_unknown(of_metric.value), f"{metric}_ci95": of_metric.interval()}
    once = np.ones((1, len(y_true)))
    precisions = average_precisions(y_true, scores, once, predictions.folds)[0]
    f1 = rate_labels("macro_f1", y_true, predictions.y_pred, scores, None, once)[0]
    drawn, telling = redrawn["average_precision"].parts, redrawn["average_precision"].telling
    found["labels"] = []
    for number, name in enumerate(names):
        own = Redrawn(float(precisions[number]), drawn[:, number], drawn[:, [number]], telling[[number]], SHARE)
        score = LabelScore(
            label=name,
            positives=int(y_true[:, number].sum()),
            average_precision=none_if_unknown(own.value),
            average_precision_ci95=own.interval(),
            f1=none_if_unknown(float(f1[number])),
            threshold=float(thresholds[number]),
        )
        found["labels"].append(score)
    return found
