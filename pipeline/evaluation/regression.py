"""How good predicted numbers are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from pipeline.arrays import Float64Array
from pipeline.evaluation.bootstrap import Redrawn, effective_groups, redraw
from pipeline.evaluation.metrics import none_if_unknown
from pipeline.evaluation.predictions import Predictions, count_rows
from pipeline.options import METRICS_OF, REGRESSION
from pipeline.results import LOWER_IS_BETTER


def rate_numbers(metric: str, y_true: Float64Array, y_pred: Float64Array, weights: Float64Array) -> Float64Array:
    """Return ``"r2"``, ``"rmse"`` or ``"mae"`` as scikit-learn defines them.

    Parameters
    ----------
    metric : str
    y_true, y_pred : (n,) float64
    weights : (b, n) float64
        How often each row counts in each of b test sets.

    Returns
    -------
    (b,) float64
        NaN for a test set without rows, and R² where all numbers are the same.
    """
    errors, total = y_true - y_pred, weights.sum(axis=1)
    total = np.where(total > 0, total, np.nan)
    if metric == "mae":
        return np.asarray(weights @ np.abs(errors) / total)
    squared = weights @ errors**2
    if metric == "rmse":
        return np.asarray(np.sqrt(squared / total))
    centred = y_true - y_true.mean()
    spread = weights @ centred**2 - (weights @ centred) ** 2 / total
    known = spread > 1e-12 * (centred @ centred)
    return np.where(known, 1 - squared / np.where(known, spread, 1), np.nan)


def redraw_numbers(metric: str, of_seeds: Sequence[Predictions]) -> Redrawn:
    """Return a metric of predicted numbers, or its mean over seeds, and what other test sets might give."""
    statistics = [partial(_as_parts, metric, one.y_true, one.y_pred) for one in of_seeds]
    telling = [np.array([effective_groups(one.units)]) for one in of_seeds]
    less = metric in LOWER_IS_BETTER
    bounds = (0.0, math.inf) if less else (-math.inf, 1.0)
    return redraw(statistics, [one.units for one in of_seeds], telling, bounds, less_is_better=less)


def _as_parts(metric: str, y_true: Float64Array, y_pred: Float64Array, weights: Float64Array) -> Float64Array:
    return rate_numbers(metric, y_true, y_pred, weights)[:, None]


def measure_numbers(predictions: Predictions) -> dict[str, Any]:
    """Return the keys of a `RegressionResult` that measure predictions."""
    found: dict[str, Any] = {**count_rows(predictions)}
    for metric in METRICS_OF[REGRESSION]:
        redrawn = redraw_numbers(metric, [predictions])
        found |= {metric: none_if_unknown(redrawn.value), f"{metric}_ci95": redrawn.interval()}
    return found
