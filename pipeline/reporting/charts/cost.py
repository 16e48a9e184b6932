"""Accuracy against the time it takes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from pipeline.arrays import Float64Array, IntArray
from pipeline.reporting.charts.theme import MARKERS, MOST_LINES, Theme


def pareto(costs: Float64Array, values: Float64Array) -> IntArray:
    """Return the indices, by rising cost, of the points that no other point beats in cost (less) and value (more)."""
    order = np.lexsort((-values, costs))
    best = np.maximum.accumulate(values[order])
    rises = np.concatenate([[True], best[1:] > best[:-1]])
    return np.asarray(order[rises])


def draw_cost(
    axes: Axes, seconds: Float64Array, accuracies: Float64Array, groups: Sequence[str], names: Sequence[str],
    theme: Theme,
) -> None:  # fmt: skip
    """Draw n points of accuracy against seconds, join those that nothing beats in both, name the most accurate one.

    Points are coloured by group: the first 8 have colours, and all others share grey. The legend is left to the caller.
    """
    coloured = list(dict.fromkeys(groups))[:MOST_LINES]
    shown = [group if group in coloured else "others" for group in groups]
    for number, group in enumerate(dict.fromkeys(shown)):
        own = [name == group for name in shown]
        color, marker = (theme.series[number], MARKERS[number]) if group in coloured else (theme.quiet, ".")
        axes.scatter(
            seconds[own], accuracies[own], s=26, color=color, marker=marker, label=group, alpha=0.75, linewidths=0
        )
    front = pareto(seconds, accuracies)
    axes.plot(seconds[front], accuracies[front], color=theme.ink, linewidth=1, drawstyle="steps-post", zorder=0)
    lowest, highest, best = seconds.min(), seconds.max(), front[-1]
    in_left_half = np.log(seconds[best] / lowest) < np.log(highest / lowest) / 2
    axes.annotate(
        names[best], (seconds[best], accuracies[best]), (0, 8), textcoords="offset points",
        ha="left" if in_left_half else "right", fontsize=8, weight="bold",
    )  # fmt: skip
    axes.set_xlabel("seconds, including the extraction of all images")
    if highest > 3 * lowest:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if highest < 1000 * lowest else (1.0,)))
        axes.set_xlabel("seconds, including the extraction of all images; logarithmic")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.margins(y=0.12)
    axes.grid(axis="x", color=theme.grid, which="major")
    theme.show_shares(axes.yaxis, "test accuracy")
