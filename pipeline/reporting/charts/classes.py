"""How much of each class is found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from pipeline.arrays import Float64Array
from pipeline.reporting.charts.theme import MARKERS, Theme, short


def draw_recalls(axes: Axes, recalls: Mapping[str, Float64Array], classes: Sequence[str], theme: Theme) -> None:
    """Draw the recall (k,) of the k classes from the bottom upwards, a mark for each model.

    It is NaN where there is no test image of a class. The legend is left to the caller.
    """
    rows = np.arange(len(classes))
    for number, (label, recall) in enumerate(recalls.items()):
        axes.plot(recall, rows, MARKERS[number], color=theme.series[number], markersize=7, label=label, alpha=0.9)
    lowest = min(float(np.nanmin(recall)) for recall in recalls.values())
    axes.hlines(rows, lowest - 0.02, 1, color=theme.grid, linewidth=1, zorder=0)
    axes.set_yticks(rows, [short(name, 24) for name in classes])
    axes.grid(visible=False)
    theme.show_shares(axes.xaxis, "share of the class that is found (recall)")
