"""Is a model right as often as it says?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from pipeline.evaluation.intervals import wilson
from pipeline.evaluation.metrics import expected_calibration_error
from pipeline.reporting.charts.style import COLOURS, MARKERS, QUIET, new_figure, tidy

BINS = 10


def reliability_figure(y_true: NDArray[np.int64], probabilities: Mapping[str, NDArray[np.float64]]) -> Figure:
    """Return accuracy over confidence, and below it how many test images have which confidence.

    Parameters
    ----------
    y_true : (n,) int64
        Class numbers.
    probabilities : mapping of str to (n, K) float64
        One or more sets to compare, by name, such as before and after calibration.
    """
    figure = new_figure(5.6, 6.2)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    top.plot([0, 1], [0, 1], color=QUIET, linestyle="--", label="right as often as sure")
    edges = np.linspace(0, 1, BINS + 1)
    for number, (name, values) in enumerate(probabilities.items()):
        confidence, right = values.max(axis=1), values.argmax(axis=1) == y_true
        x, y, counts = reliability(confidence, right)
        filled = counts[counts > 0]
        low, high = np.array([wilson(round(share * n), n) for share, n in zip(y, filled, strict=True)]).T
        error = expected_calibration_error(y_true, values)
        color, marker = COLOURS[number], MARKERS[number]
        label = f"{name}: calibration error {error:.3f}"
        top.errorbar(x, y, (y - low, high - y), color=color, marker=marker, capsize=3, alpha=0.85, label=label)
        width = 1 / BINS / len(probabilities)
        bottom.bar(edges[:-1] + width * number, counts, width * 0.9, align="edge", color=color)
    top.set(ylabel="accuracy", ylim=(-0.02, 1.02), title="Reliability on test images, with 95 % intervals")
    bottom.set(xlabel="confidence: the largest probability", ylabel="images", xlim=(0, 1.02))
    top.legend(frameon=False, loc="lower right")
    tidy(top)
    tidy(bottom)
    return figure


def reliability(
    confidence: NDArray[np.floating[Any]], right: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Sort rows (n,) into ten bins of confidence, of equal width and closed above as those of the calibration error.

    Returns
    -------
    confidence, accuracy : (b,) float64
        Means of the bins that have rows.
    counts : (10,) int64
        Rows of each bin.
    """
    place = np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], confidence)
    counts = np.bincount(place, minlength=BINS)
    filled = counts > 0
    means = [
        np.bincount(place, weights=values, minlength=BINS)[filled] / counts[filled] for values in (confidence, right)
    ]
    return means[0], means[1], counts
