"""Is a model right as often as its probabilities say?"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.arrays import BoolArray, Float64Array, FloatArray, IntArray
from pipeline.evaluation.intervals import wilson
from pipeline.evaluation.metrics import expected_calibration_error
from pipeline.reporting.charts.theme import MARKERS, SCREEN, Theme

BINS = 10
Bins = tuple[Float64Array, Float64Array, IntArray]
"""What `reliability` returns."""
_CONFIDENCE = "confidence: the largest probability"


def reliability(confidence: FloatArray, right: BoolArray) -> Bins:
    """Sort rows (n,) into ten bins of confidence, of equal width and closed above as those of the calibration error.

    Returns the mean confidence and accuracy (b,) of the bins that have rows, and the number of rows (10,) of each bin.
    """
    bins = np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], confidence)
    counts = np.bincount(bins, minlength=BINS)
    filled = counts > 0
    means = [
        np.bincount(bins, weights=values, minlength=BINS)[filled] / counts[filled] for values in (confidence, right)
    ]
    return means[0], means[1], counts


def draw_reliability(axes: Axes, models: Mapping[str, Bins], theme: Theme) -> None:
    """Draw accuracy against confidence with Wilson's 95 % intervals, a line for each model; no legend."""
    axes.plot([0, 1], [0, 1], color=theme.quiet, linestyle="--", linewidth=1, label="right as often as sure")
    for number, (label, (confidence, accuracy, counts)) in enumerate(models.items()):
        filled = counts[counts > 0]
        ends = np.array([wilson(round(share * n), n) for share, n in zip(accuracy, filled, strict=True)])
        axes.errorbar(
            confidence, accuracy, np.abs(ends.T - accuracy), color=theme.series[number], marker=MARKERS[number],
            markersize=5, linewidth=1.8, elinewidth=1, capsize=3, alpha=0.85, label=label,
        )  # fmt: skip
    axes.set(xlabel=_CONFIDENCE, ylabel="accuracy", xlim=(0, 1.02), ylim=(-0.02, 1.02))


def reliability_figure(y_true: IntArray, probabilities: Mapping[str, Float64Array]) -> Figure:
    """Return accuracy over confidence, and below it how many test images have which confidence.

    The probabilities (n, K) are one or more sets to compare, by name, such as before and after calibration.
    """
    models = {}
    for name, values in probabilities.items():
        label = f"{name}: calibration error {expected_calibration_error(y_true, values):.3f}"
        models[label] = reliability(values.max(axis=1), values.argmax(axis=1) == y_true)
    with SCREEN.figure(5.6, 6.2) as figure:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        draw_reliability(top, models, SCREEN)
        top.set(xlabel="", title="Reliability on test images, with 95 % intervals")
        top.legend(loc="best")
        width = 1 / BINS / len(models)
        for number, (_, _, counts) in enumerate(models.values()):
            left = np.arange(BINS) / BINS + width * number
            bottom.bar(left, counts, width * 0.9, align="edge", color=SCREEN.series[number])
        bottom.set(xlabel=_CONFIDENCE, ylabel="images")
    return figure
