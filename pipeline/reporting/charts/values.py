"""Predicted numbers beside the true ones, and how well each of several labels is predicted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from pipeline.arrays import Float64Array
from pipeline.reporting.charts.theme import SCREEN, short
from pipeline.results import LabelScore

MOST_LABELS = 40
"""With more, those of most test images are shown."""


def residuals_figure(y_true: Float64Array, y_pred: Float64Array, target: str, title: str) -> Figure:
    """Return predicted numbers (n,) over the true ones, and below them how far off each prediction is."""
    with SCREEN.figure(5.6, 7.0) as figure:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        ends = [min(y_true.min(), y_pred.min()), max(y_true.max(), y_pred.max())]
        top.plot(ends, ends, color=SCREEN.quiet, linestyle="--", linewidth=1, label="right")
        marks = {"color": SCREEN.series[0], "alpha": float(np.clip(60 / len(y_true) ** 0.5, 2, 8)) / 10}
        top.plot(y_true, y_pred, ".", **marks)
        top.set(ylabel=f"predicted {target}", title=title)
        top.legend(loc="upper left")
        bottom.axhline(0, color=SCREEN.quiet, linestyle="--", linewidth=1)
        bottom.plot(y_true, y_pred - y_true, ".", **marks)
        bottom.set(xlabel=f"true {target}", ylabel="predicted − true")
    return figure


def precisions_figure(scores: Sequence[LabelScore], title: str) -> Figure:
    """Return the average precision of each label with its interval."""
    shown = sorted((one for one in scores if one.average_precision is not None), key=lambda one: -one.positives)
    shown = sorted(shown[:MOST_LABELS], key=lambda one: one.average_precision or 0)
    with SCREEN.figure(7.0, max(2.4, 0.3 * len(shown) + 1.4)) as figure:
        axes = figure.subplots()
        rows = np.arange(len(shown))
        values = np.array([one.average_precision for one in shown])
        ends = np.array([one.average_precision_ci95 or (one.average_precision,) * 2 for one in shown])
        axes.errorbar(
            values, rows, xerr=np.abs(ends.T - values), fmt="o", color=SCREEN.series[0], markersize=5, capsize=3
        )
        axes.set_yticks(rows, [f"{short(one.label)} ({one.positives})" for one in shown])
        axes.set(title=title)
        axes.set_xlim(right=1.0 + 0.02 * (1 - axes.get_xlim()[0]))
        axes.grid(axis="x")
        SCREEN.show_shares(axes.xaxis, "average precision on test images, 95 % intervals (number that have the label)")
    return figure
