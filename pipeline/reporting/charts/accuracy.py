"""Accuracy in lines: over the layers of a network, and over the number of labels."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from pipeline.evaluation.comparisons import best_validated
from pipeline.evaluation.intervals import accuracy_interval
from pipeline.evaluation.seeds import mean_validation
from pipeline.evaluation.wording import ACCURACY, Measure
from pipeline.reporting.charts.theme import MARKERS, Theme, short
from pipeline.results import FitResult

OF_CLASSES = Measure(ACCURACY)


@dataclass(frozen=True)
class Line:
    """One line of a chart: k points from left to right with intervals, perhaps with names and the values of seeds.

    `best` tells which points may be the best of the whole chart, ``()`` where that is unknown; `chosen` is the index of
    the point that is best on validation, None if nothing was validated.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    intervals: Sequence[tuple[float, float]]
    names: Sequence[str] = ()
    seeds: Sequence[Sequence[float]] = ()
    dashed: bool = False
    best: Sequence[bool] = ()
    chosen: int | None = None


def depth_line(
    label: str, results: Mapping[int, Sequence[FitResult]], best: Collection[tuple[str, str, int | str]] = ()
) -> Line:
    """Return the line through mean accuracies, with Wilson's intervals, of results by position and then by seed.

    `best` is that of `pipeline.fit.FitReport.may_be_best`.
    """
    seeds = [[result.accuracy for result in group] for group in results.values()]
    means = [float(np.mean(accuracies)) for accuracies in seeds]
    intervals = [
        accuracy_interval(mean, group[0].n_test, group[0].n_effective)
        for mean, group in zip(means, results.values(), strict=True)
    ]
    ones = [group[0] for group in results.values()]
    among = [(one.layer, one.head, one.shots) in best for one in ones] if best else ()
    validated = [mean_validation(group) for group in results.values()]
    chosen = None if any(score is None for score, _ in validated) else best_validated(validated)
    return Line(label, list(results), means, intervals, [one.layer for one in ones], seeds, best=among, chosen=chosen)


def draw_depth(
    axes: Axes,
    lines: Sequence[Line],
    theme: Theme,
    baseline: tuple[str, float] | None = None,
    measure: Measure = OF_CLASSES,
) -> None:
    """Draw accuracy, or another measure, against depth with intervals.

    The layer that validation chose is named, and what may be the best is filled.

    The points of the lines, at most 8, are layers from the image upwards; `baseline` is the name and value of a
    horizontal line to compare with. A single line has its layer named beside the point, and a dot for each seed. With
    several lines, layers are named in the legend, and the lines are shifted sideways a little, so that their intervals
    do not hide each other. Ticks and legend are left to the caller.
    """
    alone = len(lines) == 1
    gap = min((float(np.diff(line.x).min()) for line in lines if len(line.x) > 1), default=1.0)
    for number, line in enumerate(lines):
        color, marker = theme.series[number], MARKERS[number]
        y = np.asarray(line.y)
        x = np.asarray(line.x) + 0.5 * gap * (number - (len(lines) - 1) / 2) / len(lines)
        errors = np.abs(np.array(line.intervals).T - y)
        named = (
            "" if line.chosen is None else f"{short(line.names[line.chosen])} {theme.measured(measure, y[line.chosen])}"
        )
        axes.errorbar(
            x, y, errors, color=color, marker=marker, markersize=5, capsize=3, linewidth=1.8, elinewidth=1.2,
            label=line.label if alone or not named else f"{line.label}: {named}",
        )  # fmt: skip
        if line.best:
            out = ~np.array(line.best)
            paper = axes.get_facecolor() if theme.paper != "none" else theme.grid
            axes.plot(x[out], y[out], marker, color=color, markerfacecolor=paper, markersize=5, zorder=3)
        if line.chosen is not None:
            ring_color = theme.accent if alone else color
            axes.plot(x[line.chosen], y[line.chosen], "o", color=ring_color, fillstyle="none", markersize=11, zorder=3)
        if alone:
            for position, values in zip(x, line.seeds, strict=False):
                axes.plot(np.full(len(values), position), values, ".", color=theme.ink, alpha=0.5, zorder=3)
        if alone and line.chosen is not None:
            top = max([line.intervals[line.chosen][1], *(line.seeds[line.chosen] if line.seeds else ())])
            axes.annotate(
                named, (x[line.chosen], top), (0, 8), textcoords="offset points", color=theme.accent, weight="bold",
                ha="center",
            )  # fmt: skip
    if baseline:
        label = f"{baseline[0]} {theme.measured(measure, baseline[1])}"
        axes.axhline(baseline[1], color=theme.quiet, linestyle="--", linewidth=1.2, label=label)
    theme.show_measure(axes.yaxis, measure)
    axes.margins(y=0.12)


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
    theme.show_measure(axes.yaxis, OF_CLASSES)
