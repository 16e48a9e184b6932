"""Accuracy over the layers of a network."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from pipeline.reporting.charts.theme import MARKERS, Line, Theme


def draw_depth(axes: Axes, lines: Sequence[Line], theme: Theme, baseline: tuple[str, float] | None = None) -> None:
    """Draw accuracy against depth with intervals, and name the layer at each line's peak.

    A single line has the name of its peak beside the point, several have theirs in the legend. Lines are shifted
    sideways a little, so that their intervals do not hide each other.

    Parameters
    ----------
    axes : Axes
        Where to draw; ticks and legend are left to the caller.
    lines : sequence of Line
        At most 8, of layers from the image upwards; `names` are those of the layers.
    theme : Theme
    baseline : (str, float), optional
        Name and accuracy of a horizontal line to compare with.
    """
    gap = min((float(np.diff(line.x).min()) for line in lines if len(line.x) > 1), default=1.0)
    for number, line in enumerate(lines):
        color, marker = theme.series[number], MARKERS[number]
        y = np.asarray(line.y)
        x = np.asarray(line.x) + 0.5 * gap * (number - (len(lines) - 1) / 2) / len(lines)
        errors = np.abs(np.array(line.intervals).T - y)
        peak = int(y.argmax())
        peak_text = f"{line.names[peak]} {theme.share(y[peak])}"
        label = line.label if len(lines) == 1 else f"{line.label}: {peak_text}"
        axes.errorbar(
            x, y, errors, color=color, marker=marker, markersize=5, capsize=3, linewidth=1.8, elinewidth=1.2,
            label=label,
        )  # fmt: skip
        for position, values in zip(x, line.seeds, strict=False):
            axes.plot(np.full(len(values), position), values, ".", color=theme.ink, alpha=0.5, zorder=3)
        peak_color = theme.accent if len(lines) == 1 else color
        axes.plot(x[peak], y[peak], marker, color=peak_color, markersize=9, zorder=3)
        if len(lines) == 1:
            top = max(line.intervals[peak][1], *line.seeds[peak]) if line.seeds else line.intervals[peak][1]
            axes.annotate(
                peak_text, (x[peak], top), (0, 8), textcoords="offset points", color=peak_color, weight="bold",
                ha="center",
            )  # fmt: skip
    if baseline:
        label = f"{baseline[0]} {theme.share(baseline[1])}"
        axes.axhline(baseline[1], color=theme.quiet, linestyle="--", linewidth=1.2, label=label)
    theme.show_shares(axes.yaxis, "test accuracy")
    axes.margins(y=0.12)
