"""Accuracy over the number of labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from pipeline.reporting.charts.theme import MARKERS, Line, Theme


def draw_labels(axes: Axes, lines: Sequence[Line], ticks: Mapping[float, str], theme: Theme) -> None:
    """Draw accuracy against training images a class, on a logarithmic axis with `ticks` (texts by position).

    There may be 8 lines; their intervals are drawn as bands. The legend is left to the caller.
    """
    for number, line in enumerate(lines):
        color, marker = theme.series[number], MARKERS[number]
        lows, highs = zip(*line.intervals, strict=True)
        axes.fill_between(line.x, lows, highs, color=color, alpha=0.15, linewidth=0)
        axes.plot(
            line.x, line.y, "--" if line.dashed else "-", color=color, marker=marker, markersize=5, linewidth=1.8,
            label=line.label,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.minorticks_off()
    axes.set_xlabel("training images a class")
    theme.show_shares(axes.yaxis, "test accuracy")
