"""Correct over- and under-confident probabilities by one number, a temperature (Guo et al. 2017).

It divides the logarithms of the probabilities, so labels do not change. It is fitted to Platt's smoothed targets (Platt
1999): with n rows the true class gets ``(n + 1) / (n + 2)`` and the other classes share the rest. So a model that
happens to be right on every held-out row is not made certain. A temperature that brings rows that it was not fitted on
no nearer to these targets is dropped.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from pipeline.arrays import Float64Array, IntArray

SMALLEST = float(np.finfo(np.float64).eps)
"""Smaller probabilities count as this in the cross-entropy."""
_FOLDS = 5
_RANGE = 14.0  # temperatures are searched from exp(-14) to exp(14)


def fit_temperature(probabilities: Float64Array, y: IntArray) -> float:
    """Return the temperature that minimises the cross-entropy to the smoothed targets.

    Parameters
    ----------
    probabilities : (n, K) float64
        Of rows that were not used in training; n at least 1, K at least 2.
    y : (n,) int64
        Columns of the true classes.
    """
    scores, n = _log(probabilities), len(y)

    def cross_entropy(log_temperature: float) -> float:
        return _cross_entropy(np.asarray(log_softmax(scores * np.exp(-log_temperature), axis=1)), y, n) / n

    # convex in 1 / temperature, so there is a single minimum in its logarithm too
    found = minimize_scalar(cross_entropy, bounds=(-_RANGE, _RANGE), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))


def useful_temperature(probabilities: Float64Array, y: IntArray) -> float | None:
    """Return the temperature for these rows, or None if it does more harm than good to rows that it has not seen.

    That is judged by cross-validation in up to five folds: temperatures fitted on the other folds must not raise the
    cross-entropy to the smoothed targets. Folds are dealt by confidence, so they do not depend on the order of rows or
    classes.

    Parameters
    ----------
    probabilities : (n, K) float64
    y : (n,) int64
        As for `fit_temperature`; n may be 0.
    """
    n = len(y)
    if n < 2:
        return None
    logs = _log(probabilities)
    folds = np.empty(n, np.int64)
    folds[np.lexsort((logs[np.arange(n), y], *np.sort(probabilities, axis=1).T[-3:]))] = np.arange(n) % min(_FOLDS, n)
    after = 0.0
    for fold in range(min(_FOLDS, n)):
        held, others = folds == fold, folds != fold
        calibrated = tempered(probabilities[held], fit_temperature(probabilities[others], y[others]))
        after += _cross_entropy(_log(calibrated), y[held], n)
    return fit_temperature(probabilities, y) if after <= _cross_entropy(logs, y, n) else None


def _cross_entropy(logs: Float64Array, y: IntArray, n: int) -> float:
    """Return the sum over rows of the cross-entropy to the smoothed targets of `n` rows."""
    of_truth = logs[np.arange(len(y)), y]
    of_others = (logs.sum(axis=1) - of_truth) / (logs.shape[1] - 1)
    return float(-((n + 1) * of_truth + of_others).sum() / (n + 2))


def tempered(probabilities: Float64Array, temperature: float | Float64Array) -> Float64Array:
    """Return probabilities (n, K) calibrated by a temperature, or one per row (n, 1); above 1 is less certain.

    A probability of 0 stays 0, such as that of a class without training rows.
    """
    with np.errstate(divide="ignore"):
        logs = np.log(probabilities, dtype=np.float64)
    return np.asarray(softmax(logs / temperature, axis=1))


def _log(probabilities: Float64Array) -> Float64Array:
    return np.log(np.maximum(probabilities, SMALLEST, dtype=np.float64))
