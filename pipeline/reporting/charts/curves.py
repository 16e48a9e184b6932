"""Accuracy over layers in their order, and over the number of labels."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.evaluation.intervals import wilson
from pipeline.reporting.charts.style import COLOURS, LINES, MARKERS, new_figure, short, tidy
from pipeline.results import FitResult

MOST_LINES = 8
"""Lines of one picture: those that end highest."""


def depth_figure(results: Sequence[FitResult]) -> Figure:
    """Return accuracy over layers, a line for each head and number of shots, with 95 % intervals.

    Intervals are Wilson's around the mean over seeds, for the test images of one seed.

    Parameters
    ----------
    results : sequence of FitResult
        Of one backbone; layers stand in their order here, the image itself first.
    """
    layers = sorted(dict.fromkeys(result.layer for result in results), key=lambda layer: layer != "input")
    lines = _lines(results, lambda result: (result.head, result.shots))
    figure = new_figure(max(6.4, 0.6 * len(layers) + 2.5), 4.6)
    axes = figure.subplots()
    for number, (label, members) in enumerate(lines.items()):
        places = np.array([place for place, layer in enumerate(layers) if any(r.layer == layer for r in members)])
        groups = [[r for r in members if r.layer == layers[place]] for place in places]
        means = np.array([np.mean([r.accuracy for r in group]) for group in groups])
        ends = np.array([_interval(group) for group in groups])
        shift = 0.5 * (number - (len(lines) - 1) / 2) / len(lines) if len(lines) > 1 else 0.0
        errors = np.abs(ends.T - means)
        axes.errorbar(places + shift, means, errors, label=label, capsize=3, linewidth=1.6, **_look(number))
    axes.set_xticks(np.arange(len(layers)), [short(layer, 28) for layer in layers], rotation=30, ha="right")
    axes.set_title("Accuracy by layer, with 95 % intervals" + _which(results))
    _finish(axes, len(lines))
    return figure


def budget_figure(results: Sequence[FitResult], n_classes: int) -> Figure:
    """Return accuracy over the number of training images a class, a line for each layer and head.

    The line goes through the means over seeds, the band from the lowest to the highest seed.

    Parameters
    ----------
    results : sequence of FitResult
        With different numbers of shots; ``"all"`` stands at the mean number of images a class.
    n_classes : int
    """

    def place(result: FitResult) -> float:
        return (result.n_train + result.n_val) / n_classes if result.shots == "all" else float(result.shots)

    lines = _lines(results, lambda result: (result.layer, result.head))
    figure = new_figure(7.2, 4.6)
    axes = figure.subplots()
    for number, (label, members) in enumerate(lines.items()):
        shots = sorted(dict.fromkeys(r.shots for r in members), key=lambda s: np.inf if s == "all" else s)
        groups = [[r for r in members if r.shots == count] for count in shots]
        places = [float(np.mean([place(r) for r in group])) for group in groups]
        values = [[r.accuracy for r in group] for group in groups]
        look = _look(number)
        axes.plot(places, [np.mean(v) for v in values], label=label, linewidth=1.6, **look)
        axes.fill_between(places, [min(v) for v in values], [max(v) for v in values], color=look["color"], alpha=0.15)
    ticks = {place(r): "all" if r.shots == "all" else str(r.shots) for r in results}
    axes.set_xscale("log")
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.minorticks_off()
    axes.set_xlabel("training images a class")
    seeds = len({r.seed for r in results})
    axes.set_title(
        "Accuracy by number of labels" + (f", band over {seeds} seeds" if seeds > 1 else "") + _which(results)
    )
    _finish(axes, len(lines))
    return figure


def _lines(results: Sequence[FitResult], key: Callable[[FitResult], Sequence[Hashable]]) -> dict[str, list[FitResult]]:
    """Group results by the parts of `key` that differ, and keep those groups whose best result is highest."""
    keys = [key(result) for result in results]
    differ = [number for number in range(len(keys[0])) if len({k[number] for k in keys}) > 1]
    groups: dict[str, list[FitResult]] = {}
    for result, found in zip(results, keys, strict=True):
        label = ", ".join(_word(found[number]) for number in differ or [len(found) - 1])
        groups.setdefault(label, []).append(result)
    kept = sorted(groups, key=lambda label: -max(r.accuracy for r in groups[label]))[:MOST_LINES]
    return {label: members for label, members in groups.items() if label in kept}


def _word(part: Hashable) -> str:
    return f"{part} shots" if isinstance(part, int) else ("all labels" if part == "all" else short(str(part), 40))


def _which(results: Sequence[FitResult]) -> str:
    """Return backbone and pooling for a title's second line."""
    return "\n" + ", ".join(dict.fromkeys(f"{r.backbone}, {r.pool} pooling" for r in results))


def _interval(group: Sequence[FitResult]) -> tuple[float, float]:
    mean, tests = float(np.mean([r.accuracy for r in group])), group[0].n_test
    return wilson(round(mean * tests), tests)


def _look(number: int) -> dict[str, Any]:
    return {"color": COLOURS[number % 8], "marker": MARKERS[number % 8], "linestyle": LINES[number % 4]}


def _finish(axes: Axes, lines: int) -> None:
    tidy(axes)
    axes.set_ylabel("test accuracy")
    if lines > 1:
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
