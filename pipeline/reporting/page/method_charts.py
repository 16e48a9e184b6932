"""Charts of all methods beside one another, over depth, labels and time: each a picture, its words and its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from matplotlib.ticker import LogLocator
from numpy.typing import NDArray

from pipeline.comparing.answer import ExtractionTimes, duration, percent, seconds
from pipeline.comparing.methods import Board, Method, Score, best_of
from pipeline.comparing.records import HEAD
from pipeline.reporting.page.svg import GRID, INK, MARKERS, QUIET, SERIES, legend_above, themed, to_svg

MOST_LINES = len(SERIES)
CLEAR_LINES = 5
"""More lines than this hide one another: then only the best head of each backbone has one."""


@dataclass(frozen=True)
class Chart:
    """One chart.

    Parameters
    ----------
    title, caption : str
        What it asks, and how to read it.
    svg : str
        The picture.
    columns : sequence of str
    rows : sequence of sequences
        Its numbers.
    """

    title: str
    caption: str
    svg: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


def depth_chart(board: Board) -> Chart | None:
    """Accuracy against depth, a line for each backbone under its best head; None where no backbone has two layers."""
    lines: dict[Method, list[Score]] = {}
    for score in board.at(board.shots[-1], HEAD):
        lines.setdefault(replace(score.method, layer=""), []).append(score)
    several_pools = len({method.pool for method in lines}) > 1
    backbones: dict[str, list[Score]] = {}
    for method, scores in lines.items():
        deep = [score for score in scores if score.method.layer != "input" and score.first.depth is not None]
        ordered = sorted(deep, key=lambda score: score.first.depth or 0)
        key = f"{method.backbone}, {method.pool}" if several_pools else method.backbone
        if len(ordered) > 1 and (key not in backbones or _peak(ordered) > _peak(backbones[key])):
            backbones[key] = ordered
    if not backbones:
        return None
    shown = dict(list(backbones.items())[:MOST_LINES])
    rows = []
    with themed() as (figure, axes):
        for number, (name, scores) in enumerate(shown.items()):
            depth = np.linspace(0, 1, len(scores))
            means = [score.accuracy for score in scores]
            lows, highs = zip(*(score.interval for score in scores), strict=True)
            best = int(np.argmax(means))
            peak = f"{scores[best].method.layer} {100 * means[best]:.1f}"
            label = f"{name}, {scores[0].method.head}: {peak}"
            color = SERIES[number]
            axes.fill_between(depth, lows, highs, color=color, alpha=0.13, linewidth=0)
            axes.plot(depth, means, color=color, marker=MARKERS[number], markersize=5, linewidth=1.8, label=label)
            axes.plot(depth[best], means[best], MARKERS[number], color=color, markersize=9)
            rows += [
                (
                    name,
                    score.method.head,
                    score.method.layer,
                    percent(score.accuracy),
                    *map(percent, score.interval),
                )
                for score in scores
            ]
        raw = [score for score in board.at(board.shots[-1], HEAD) if score.method.layer == "input"]
        if raw:
            base = max(score.accuracy for score in raw)
            axes.axhline(base, color=QUIET, linestyle="--", linewidth=1, label=f"raw pixels {100 * base:.1f}")
        depths = {tuple(score.method.layer for score in scores) for scores in shown.values()}
        if len(depths) == 1 and len(names := depths.pop()) <= 12:
            axes.set_xticks(np.linspace(0, 1, len(names)), names, rotation=30, ha="right")
        else:
            axes.set_xticks([0, 1], ["first layer", "last layer"])
        _percent_axis(axes, "test accuracy, %")
        axes.margins(y=0.12)
        legend_above(figure)
        svg = to_svg(figure, f"Test accuracy by depth for {', '.join(shown)}; the numbers are in the table below.")
    caption = "Each backbone under the head that is best at its best layer; bands are 95 % intervals."
    columns = ("backbone", "head", "layer", "accuracy", "95 % from", "to")
    return Chart("Where in the network are the useful features?", caption, svg, columns, rows)


def labels_chart(board: Board) -> Chart | None:
    """Accuracy against labels a class for the best method of each kind and backbone; None with one number of labels."""
    if len(board.shots) < 2:
        return None
    rows = []
    with themed() as (figure, axes):
        methods = contenders(board)
        if len(methods) > CLEAR_LINES:
            methods = contenders(board, by_head=False)
        for number, method in enumerate(methods[:MOST_LINES]):
            scores = [board.scores[method, shots] for shots in board.shots if (method, shots) in board.scores]
            labels = [_labels_a_class(score, board) for score in scores]
            lows = [min(score.accuracies) for score in scores]
            highs = [max(score.accuracies) for score in scores]
            axes.fill_between(labels, lows, highs, color=SERIES[number], alpha=0.15, linewidth=0)
            dashes = "-" if scores[0].method.is_frozen else "--"
            means = [score.accuracy for score in scores]
            axes.plot(
                labels, means, dashes, color=SERIES[number], marker=MARKERS[number], markersize=5, linewidth=1.8,
                label=scores[0].name,
            )  # fmt: skip
            rows += [
                (score.name, score.shots, f"{label:.0f}", percent(score.accuracy), percent(low), percent(high))
                for score, label, low, high in zip(scores, labels, lows, highs, strict=True)
            ]
        axes.set_xscale("log")
        ticks = sorted({round(_labels_a_class(score, board)) for score in board.scores.values()})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("training images a class")
        _percent_axis(axes, "test accuracy, %")
        legend_above(figure)
        svg = to_svg(figure, "Test accuracy by training images a class; the numbers are in the table below.")
    caption = "Lines are means, bands reach from the lowest to the highest seed; dashed lines are fine-tuned."
    columns = ("method", "shots", "images a class", "mean", "lowest seed", "highest seed")
    return Chart("How many labels does it take?", caption, svg, columns, rows)


def cost_chart(board: Board, extraction: ExtractionTimes) -> Chart:
    """Accuracy against seconds at the most labels, with the methods that nothing beats on both."""
    scores = board.at(board.shots[-1])
    costs = np.array([max(seconds(score, extraction), 1e-3) for score in scores])
    values = np.array([score.accuracy for score in scores])
    front = pareto(costs, values)
    groups = list(dict.fromkeys(score.method.group for score in scores))[:MOST_LINES]
    with themed() as (figure, axes):
        for number, group in enumerate(groups):
            own = [place for place, score in enumerate(scores) if score.method.group == group]
            axes.scatter(
                costs[own], values[own], s=26, color=SERIES[number], marker=MARKERS[number], label=group, alpha=0.75,
                linewidths=0,
            )  # fmt: skip
        axes.plot(costs[front], values[front], color=INK, linewidth=1, drawstyle="steps-post", zorder=0)
        best = front[-1]
        left = np.log(costs[best] / costs.min()) < np.log(costs.max() / costs.min()) / 2
        axes.annotate(
            scores[best].name, (costs[best], values[best]), (0, 8), textcoords="offset points",
            ha="left" if left else "right", fontsize=8, weight="bold",
        )  # fmt: skip
        if costs.max() > 3 * costs.min():
            axes.set_xscale("log")
            near = costs.max() < 1000 * costs.min()
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if near else (1.0,)))
            axes.set_xlabel("seconds, extraction of all images included; logarithmic")
        else:
            axes.set_xlabel("seconds, extraction of all images included")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.margins(y=0.12)
        axes.grid(axis="x", color=GRID, which="major")
        _percent_axis(axes, "test accuracy, %")
        legend_above(figure, columns=2)
        svg = to_svg(figure, "Test accuracy against seconds for every method; the numbers are in the table below.")
    order = sorted(range(len(scores)), key=lambda place: costs[place])
    marked = set(front.tolist())
    rows = [
        (scores[place].name, duration(costs[place]), percent(values[place]), "yes" if place in marked else "")
        for place in order
    ]
    caption = "The black line joins what nothing beats at once in time and in accuracy."
    return Chart("What does accuracy cost?", caption, svg, ("method", "time", "accuracy", "unbeaten"), rows)


def contenders(board: Board, *, by_head: bool = True) -> list[Method]:
    """Return the best layer of each backbone (and of each of its heads), and every fine-tuning."""
    groups: dict[str | Method, list[Score]] = {}
    for score in board.at(board.shots[-1]):
        group = score.method.group if by_head else score.method.backbone
        groups.setdefault(group if score.method.is_frozen else score.method, []).append(score)
    best = [best_of(scores) for scores in groups.values()]
    return [score.method for score in best if score is not None]


def pareto(costs: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the places that no other one beats in cost (less) and value (more), by rising cost."""
    order = np.lexsort((-values, costs))
    best = np.maximum.accumulate(values[order])
    rises = np.concatenate([[True], best[1:] > best[:-1]])
    return np.asarray(order[rises])


def _peak(scores: Sequence[Score]) -> float:
    return max(score.accuracy for score in scores)


def _labels_a_class(score: Score, board: Board) -> float:
    result, classes = score.first.result, max(1, score.first.n_classes)
    return float(score.shots) if score.shots != "all" else (result.n_train + result.n_val) / classes


def _percent_axis(axes: Any, label: str) -> None:
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}")
    axes.set_ylabel(label)
