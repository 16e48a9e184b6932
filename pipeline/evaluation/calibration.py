"""Mend over- and under-confident probabilities by one number, a temperature (Guo et al. 2017).

It divides the logarithms of the probabilities, so labels stay as they are. It is fitted to Platt's smoothed targets
(Platt 1999): of n rows the truth gets ``(n + 1) / (n + 2)`` and the other classes share the rest, so that held-out rows
which happen to be all right do not make a model certain.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from pipeline.arrays import Float64Array, IntArray

SMALLEST = float(np.finfo(np.float64).eps)
"""What a probability of zero counts as: k-NN gives such."""
_RANGE = 14.0  # natural logarithm of the largest temperature, and of one over the smallest


def fit_temperature(probabilities: Float64Array, y: IntArray) -> float:
    """Return the temperature of least cross-entropy to the smoothed targets.

    Parameters
    ----------
    probabilities : (n, K) float64
        Of rows that were not trained on; n at least 1, K at least 2.
    y : (n,) int64
        The true columns.
    """
    n, k = probabilities.shape
    scores = _log(probabilities)
    target = np.full((n, k), 1 / (n + 2) / (k - 1))
    target[np.arange(n), y] = (n + 1) / (n + 2)

    def cross_entropy(log_temperature: float) -> float:
        logs = np.asarray(log_softmax(scores * np.exp(-log_temperature), axis=1))
        return float(-np.vdot(target, logs) / n)

    # convex in one over the temperature, so there is one minimum in its logarithm too
    found = minimize_scalar(cross_entropy, bounds=(-_RANGE, _RANGE), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))


def tempered(probabilities: Float64Array, temperature: float | Float64Array) -> Float64Array:
    """Return calibrated probabilities.

    Parameters
    ----------
    probabilities : (n, K) float64
    temperature : float or (n, 1) float64
        1 changes nothing, more makes less certain.

    Returns
    -------
    (n, K) float64
    """
    return np.asarray(softmax(_log(probabilities) / temperature, axis=1))


def _log(probabilities: Float64Array) -> Float64Array:
    return np.log(np.maximum(probabilities, SMALLEST, dtype=np.float64))
