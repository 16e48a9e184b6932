"""One curve of accuracy over depth, its peak named: the picture of the demo."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from pipeline.reporting.charts.style import ACCENT, INK, QUIET, tidy


def depth_curve(
    axes: Axes,
    layers: Sequence[str],
    accuracies: NDArray[np.float64],
    intervals: NDArray[np.float64],
    baseline: tuple[str, float] | None = None,
) -> None:
    """Draw accuracy against depth.

    Parameters
    ----------
    axes : Axes
        Where to draw.
    layers : sequence of str
        Names from the image upwards, k of them.
    accuracies : ndarray of float64, shape (k, seeds)
        Every seed's accuracy; the line goes through their means.
    intervals : ndarray of float64, shape (k, 2)
        Lower and upper ends, drawn as bars.
    baseline : tuple of str and float, optional
        Name and accuracy of a horizontal line to compare with.
    """
    places = np.arange(len(layers))
    means = accuracies.mean(axis=1)
    best = int(means.argmax())
    axes.vlines(places, intervals[:, 0], intervals[:, 1], color=QUIET, linewidth=5, alpha=0.45, label="95 % interval")
    axes.plot(places, means, color=INK, linewidth=2, marker="o", label="mean over seeds")
    axes.plot(np.repeat(places, accuracies.shape[1]), accuracies.ravel(), ".", color=INK, alpha=0.5, markersize=5)
    axes.plot(places[best], means[best], "o", color=ACCENT, markersize=10, zorder=3)
    axes.annotate(
        f"{layers[best]}  {means[best]:.3f}",
        (places[best], max(intervals[best, 1], accuracies[best].max())),
        (0, 8),
        textcoords="offset points",
        color=ACCENT,
        weight="bold",
        ha="center",
    )
    if baseline:
        axes.axhline(baseline[1], color=QUIET, linestyle="--", label=f"{baseline[0]}  {baseline[1]:.3f}")
    axes.set_xticks(places, layers, rotation=30, ha="right")
    axes.set_ylabel("test accuracy")
    tidy(axes)
    axes.legend(frameon=False, loc="lower center")
