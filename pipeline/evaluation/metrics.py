"""How good predictions are.

Accuracies, F1 and kappa follow from three counts per class. The counts take leading axes, so that a bootstrap computes
a thousand samples at once; scikit-learn's functions take one sample at a time. Its `log_loss` would also hide a
probability of zero, and its `balanced_accuracy_score` warns about predicted classes without a row.

To add a metric, compute it in `evaluate`, and add it to `Metrics` and to `pipeline.results.FitResult`. If parameters
may be chosen by it, also add it to `rate` and to `pipeline.options.METRICS`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

import numpy as np

from pipeline.arrays import Float64Array, IntArray
from pipeline.errors import FitError

ECE_BINS = 15
OF_SCORES = ("auroc", "average_precision", "top5_accuracy")
"""The metrics of `pipeline.options.METRICS` that need scores of all classes, not labels alone."""
TOP = 5
FEWEST_FOR_TOP5 = 10
"""With fewer classes, a guess is among the top five too often."""


class Counts(NamedTuple):
    """Numbers of rows of each of K classes.

    Parameters
    ----------
    true, predicted : (..., K) int64
        Rows whose true label it is, and rows for which it was predicted.
    right : (..., K) int64
        Rows for which both hold.
    """

    true: IntArray
    predicted: IntArray
    right: IntArray


def mean_if_known(values: Sequence[float | None]) -> float | None:
    """Return the mean of some metric; None if any of the values is None or NaN."""
    known = [value for value in values if value is not None and not math.isnan(value)]
    return fmean(known) if len(known) == len(values) else None


@dataclass(frozen=True)
class Metrics:
    """Metrics of one set of predictions, between 0 and 1 except for log-loss, which is in nats.

    Parameters
    ----------
    accuracy : float
        Proportion of rows predicted right.
    mean_per_class_accuracy : float
        Mean recall over the classes that occur among the true labels.
    macro_f1 : float
        Mean F1 over the classes that occur among the true labels or the predictions.
    log_loss, ece : float or None
        None without probabilities. Log-loss is infinite if a true label has probability 0.
    kappa : float
        Cohen's kappa (Cohen 1960): agreement beyond chance, at least -1.
    top5_accuracy : float or None
        Proportion of rows whose class is among the five of largest score; None below ten classes or without scores.
    auroc, average_precision : float or None
        Of each class against the rest, means over the classes that occur beside others; None without scores.
    """

    accuracy: float
    mean_per_class_accuracy: float
    macro_f1: float
    log_loss: float | None
    ece: float | None
    kappa: float
    top5_accuracy: float | None
    auroc: float | None
    average_precision: float | None


def evaluate(
    y_true: IntArray,
    y_pred: IntArray,
    n_classes: int,
    probabilities: Float64Array | None = None,
    scores: Float64Array | None = None,
    folds: IntArray | None = None,
) -> Metrics:
    """Compute the metrics of predictions.

    Parameters
    ----------
    y_true, y_pred : (n,) int64
        Class numbers below `n_classes`, n at least 1.
    n_classes : int
        Number of classes, K.
    probabilities : (n, K) float64, optional
        Rows that sum to one.
    scores : (n, K) float64, optional
        Of each class, larger where it is likelier; by default the probabilities.
    folds : (n,) int64, optional
        The model that gave the scores of each row, see `rate`.

    Examples
    --------
    >>> found = evaluate(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 0]), n_classes=2)
    >>> found.accuracy, found.mean_per_class_accuracy
    (0.75, 0.75)
    """
    counts = count(y_true, y_pred, n_classes)
    ranked = probabilities if scores is None else scores
    of_scores = {name: none_if_unknown(rate(name, y_true, y_pred, n_classes, ranked, folds)) for name in OF_SCORES}
    if n_classes < FEWEST_FOR_TOP5:
        of_scores["top5_accuracy"] = None
    return Metrics(
        accuracy=float(np.mean(y_true == y_pred)),
        mean_per_class_accuracy=float(mean_per_class_accuracy(counts)),
        macro_f1=float(macro_f1(counts)),
        log_loss=None if probabilities is None else log_loss(y_true, probabilities),
        ece=None if probabilities is None else expected_calibration_error(y_true, probabilities),
        kappa=float(kappa(counts)),
        **of_scores,
    )


def rate(
    metric: str,
    y_true: IntArray,
    y_pred: IntArray,
    n_classes: int,
    scores: Float64Array | None = None,
    folds: IntArray | None = None,
) -> float:
    """Return one metric of `pipeline.options.METRICS`; NaN where it is not defined.

    Scores of different models do not compare, so AUROC and average precision are means over `folds`.
    """
    of_counts = {"mean_per_class_accuracy": mean_per_class_accuracy, "macro_f1": macro_f1, "kappa": kappa}
    if metric == "accuracy":
        return float(np.mean(y_true == y_pred))
    if metric in of_counts:
        return float(of_counts[metric](count(y_true, y_pred, n_classes)))
    if scores is None:
        return math.nan
    if metric == "top5_accuracy":
        return top5_accuracy(y_true, scores)
    of_ranks = {"auroc": auroc, "average_precision": average_precision}[metric]
    parts = [np.arange(len(y_true))] if folds is None else [np.flatnonzero(folds == fold) for fold in np.unique(folds)]
    found = [of_ranks(y_true[part], scores[part]) for part in parts]
    known = [value for value in found if not math.isnan(value)]
    return fmean(known) if known else math.nan


def check_metric(metric: str, n_classes: int) -> None:
    """Raise `FitError` if a metric of `pipeline.options.METRICS` says nothing about so few classes."""
    if metric == "top5_accuracy" and n_classes < FEWEST_FOR_TOP5:
        raise FitError(f"{metric} is for {FEWEST_FOR_TOP5} classes or more, got {n_classes}; use another metric")


def none_if_unknown(value: float) -> float | None:
    """Return None for NaN."""
    return None if math.isnan(value) else value


def count(y_true: IntArray, y_pred: IntArray, n_classes: int) -> Counts:
    """Count the rows of each class; labels (..., n) are class numbers below `n_classes`."""
    hits = np.where(y_true == y_pred, y_true, n_classes)  # misses go to an extra class, dropped below
    return Counts(_tally(y_true, n_classes), _tally(y_pred, n_classes), _tally(hits, n_classes + 1)[..., :n_classes])


def mean_per_class_accuracy(counts: Counts) -> Float64Array:
    """Return the mean recall over classes that occur among the true labels: (...) of counts (..., K)."""
    recall = counts.right / np.maximum(counts.true, 1)  # 0 for a class without rows, which is not counted
    return np.asarray(recall.sum(axis=-1) / (counts.true > 0).sum(axis=-1))


def macro_f1(counts: Counts) -> Float64Array:
    """Return the mean F1 over classes that occur among true labels or predictions: (...) of counts (..., K)."""
    touched = counts.true + counts.predicted  # 2 tp + fp + fn
    f1 = 2 * counts.right / np.maximum(touched, 1)
    return np.asarray(f1.sum(axis=-1) / (touched > 0).sum(axis=-1))


def kappa(counts: Counts) -> Float64Array:
    """Return Cohen's kappa: (...) of counts (..., K); 0 where chance alone gets every row right."""
    n = counts.true.sum(axis=-1)
    chance = (counts.true / n[..., None] * counts.predicted / n[..., None]).sum(axis=-1)
    agreed = counts.right.sum(axis=-1) / n
    return np.asarray(np.where(chance < 1, (agreed - chance) / np.where(chance < 1, 1 - chance, 1), 0.0))


def top5_accuracy(y_true: IntArray, scores: Float64Array) -> float:
    """Return the share of rows (n,) whose class is among the five of largest score (n, K); ties count against it."""
    own = scores[np.arange(len(y_true)), y_true]
    return float(np.mean((scores >= own[:, None]).sum(axis=1) <= TOP))


def auroc(y_true: IntArray, scores: Float64Array) -> float:
    """Return the mean area under the ROC curve of each class against the rest (Mann and Whitney 1947).

    Classes without a row, or without a row of another class, are left out; NaN if all are.
    """
    found = []
    for own, others in _one_against_rest(y_true, scores):
        pairs = sum(np.searchsorted(others, own, side) for side in ("left", "right")) / 2  # a tie is half a pair won
        found.append(float(np.mean(pairs)) / len(others))
    return fmean(found) if found else math.nan


def average_precision(y_true: IntArray, scores: Float64Array) -> float:
    """Return the mean over classes of the precision at each row of the class, as scikit-learn has it.

    Classes without a row, or without a row of another class, are left out; NaN if all are.
    """
    found = []
    for own, others in _one_against_rest(y_true, scores):
        right = len(own) - np.searchsorted(own, own)  # rows of the class whose score is at least this row's
        wrong = len(others) - np.searchsorted(others, own)
        found.append(float(np.mean(right / (right + wrong))))
    return fmean(found) if found else math.nan


def _one_against_rest(y_true: IntArray, scores: Float64Array) -> Iterator[tuple[Float64Array, Float64Array]]:
    """Yield the sorted scores that the rows of each class and all other rows have for that class, if there are both."""
    for label in np.unique(y_true):
        own = y_true == label
        if not own.all():
            yield np.sort(scores[own, label]), np.sort(scores[~own, label])


def log_loss(y_true: IntArray, probabilities: Float64Array) -> float:
    """Return the mean negative log-probability (nats) of true labels (n,) under (n, K); infinite if one is 0."""
    given = probabilities[np.arange(len(y_true)), y_true]
    with np.errstate(divide="ignore"):
        return float(-np.mean(np.log(given))) + 0.0  # no negative zero


def expected_calibration_error(y_true: IntArray, probabilities: Float64Array, bins: int = ECE_BINS) -> float:
    """Return the mean gap between confidence and accuracy over equal-width confidence bins (Guo et al. 2017, eq. 3).

    Parameters
    ----------
    y_true : (n,) int64
    probabilities : (n, K) float64
        The largest of a row is its confidence, and its class the prediction.
    bins : int, default 15
        Bin b holds the confidences in ``((b - 1) / bins, b / bins]``.
    """
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == y_true
    edges = np.linspace(0, 1, bins + 1)[1:-1]
    bin_of_row = np.searchsorted(edges, confidence, side="left")
    gap = np.bincount(bin_of_row, weights=confidence - right, minlength=bins)
    return float(np.abs(gap).sum() / len(y_true))


def _tally(y: IntArray, n_classes: int) -> IntArray:
    """Count each class along the last axis: (..., n) to (..., n_classes)."""
    samples = y.reshape(-1, y.shape[-1])
    cells = np.arange(len(samples))[:, None] * n_classes + samples
    counts = np.bincount(cells.ravel(), minlength=len(samples) * n_classes)
    return counts.reshape(*y.shape[:-1], n_classes).astype(np.int64)
