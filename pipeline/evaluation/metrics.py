"""How good predictions are.

All metrics but log-loss and ECE follow from three counts per class. The counts take leading axes, so that a bootstrap
computes a thousand samples at once; scikit-learn's functions take one sample at a time. Its `log_loss` would also hide
a probability of zero, and its `balanced_accuracy_score` warns about predicted classes without a row.

To add a metric, compute it in `evaluate`, and add it to `Metrics` and to `pipeline.results.FitResult`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

import numpy as np

from pipeline.arrays import Float64Array, IntArray

ECE_BINS = 15


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
    """

    accuracy: float
    mean_per_class_accuracy: float
    macro_f1: float
    log_loss: float | None
    ece: float | None


def evaluate(y_true: IntArray, y_pred: IntArray, n_classes: int, probabilities: Float64Array | None = None) -> Metrics:
    """Compute the metrics of predictions.

    Parameters
    ----------
    y_true, y_pred : (n,) int64
        Class numbers below `n_classes`, n at least 1.
    n_classes : int
        Number of classes, K.
    probabilities : (n, K) float64, optional
        Rows that sum to one.

    Examples
    --------
    >>> found = evaluate(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 0]), n_classes=2)
    >>> found.accuracy, found.mean_per_class_accuracy
    (0.75, 0.75)
    """
    counts = count(y_true, y_pred, n_classes)
    return Metrics(
        accuracy=float(np.mean(y_true == y_pred)),
        mean_per_class_accuracy=float(mean_per_class_accuracy(counts)),
        macro_f1=float(macro_f1(counts)),
        log_loss=None if probabilities is None else log_loss(y_true, probabilities),
        ece=None if probabilities is None else expected_calibration_error(y_true, probabilities),
    )


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
