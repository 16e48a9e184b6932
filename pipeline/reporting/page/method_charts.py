"""The page's charts of all methods, over depth, labels and time: each a picture, its words and its numbers.

A method's *measure* is accuracy, or a metric of labels or numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from pipeline.arrays import Float64Array, IntArray
from pipeline.comparing.answer import ExtractionTimes, duration, seconds
from pipeline.comparing.folder import HEAD
from pipeline.comparing.methods import Leaderboard, Method, MethodScore, best_of, is_validated
from pipeline.comparing.paired import BestSet
from pipeline.evaluation.wording import ACCURACY
from pipeline.reporting.charts.accuracy import Line, draw_depth, draw_labels
from pipeline.reporting.charts.theme import MARKERS, MOST_LINES
from pipeline.reporting.page.svg import PAGE, add_legend, to_svg

WIDTH, HEIGHT = 5.4, 3.5  # inches
CLEAR_LINES = 5  # with more lines than this, which hide one another, only the best head of each backbone has one


@dataclass(frozen=True)
class Chart:
    """A picture, the question that it answers, how to read it, and its numbers."""

    title: str
    caption: str
    svg: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


def depth_chart(board: Leaderboard, among: BestSet | None) -> Chart | None:
    """Return the measure over depth, a line for each backbone under its best head; None if none has two layers."""
    backbones = dict(list(_by_depth(board).items())[:MOST_LINES])
    if not backbones:
        return None
    lines = [
        Line(
            f"{name}, {scores[0].method.head}",
            np.linspace(0, 1, len(scores)).tolist(),
            [score.value for score in scores],
            [score.interval or (score.value, score.value) for score in scores],
            tuple(score.method.layer for score in scores),
            best=[score.name in among.methods for score in scores] if among else (),
            chosen=scores.index(best_of(scores)) if is_validated(scores) else None,  # type: ignore[arg-type]
        )
        for name, scores in backbones.items()
    ]
    measure = next(iter(backbones.values()))[0].measure
    raw = [score.value for score in board.at(board.shots[-1], HEAD) if score.method.layer == "input"]
    best_raw = max(raw, key=lambda value: measure.sign * value, default=math.nan)
    with PAGE.figure(WIDTH, HEIGHT) as figure:
        axes = figure.subplots()
        draw_depth(axes, lines, PAGE, None if math.isnan(best_raw) else ("raw pixels", best_raw), measure)
        if len({line.names for line in lines}) == 1 and len(names := lines[0].names) <= 12:
            axes.set_xticks(np.linspace(0, 1, len(names)), names, rotation=30, ha="right")
        else:
            axes.set_xticks([0, 1], ["first layer", "last layer"])
        add_legend(figure)
        title = measure.title
        svg = to_svg(figure, f"Test {title} by depth for {', '.join(backbones)}; the numbers are in the table below.")
    rows = [
        (name, score.method.head, score.method.layer, measure.text(score.value), *_ends(score))
        for name, scores in backbones.items()
        for score in scores
    ]
    caption = (
        "Each backbone under its best head; bars are 95 % intervals, and a ring marks the layer chosen on validation."
    )
    caption += " Filled points may be the best of all methods." if among else ""
    columns = ("backbone", "head", "layer", title, "95 % from", "to")
    return Chart("Where in the network are the useful features?", caption, svg, columns, rows)


def _ends(score: MethodScore) -> tuple[str, str]:
    """Return the ends of a score's interval as text."""
    low, high = score.interval or (math.nan, math.nan)
    return score.measure.text(low), score.measure.text(high)


def labels_chart(board: Leaderboard) -> Chart | None:
    """Return accuracy over labels a class for the best methods; None if there is only one number of labels."""
    if len(board.shots) < 2:
        return None
    methods = list(contenders(board))
    if len(methods) > CLEAR_LINES:
        methods = list(contenders(board, by_head=False))
    lines, rows = [], []
    for method in methods[:MOST_LINES]:
        scores = [board.scores[method, shots] for shots in board.shots if (method, shots) in board.scores]
        labels = [score.labels_a_class for score in scores]
        spans = [(min(score.values), max(score.values)) for score in scores]
        means = [score.value for score in scores]
        lines.append(Line(scores[0].name, labels, means, spans, dashed=not method.is_frozen))
        rows += [
            (score.name, score.shots, f"{label:.0f}", *map(score.measure.text, (score.value, *span)))
            for score, label, span in zip(scores, labels, spans, strict=True)
        ]
    ticks = sorted({round(score.labels_a_class) for score in board.scores.values()})
    with PAGE.figure(WIDTH, HEIGHT) as figure:
        draw_labels(figure.subplots(), lines, {tick: f"{tick:g}" for tick in ticks}, PAGE)
        add_legend(figure)
        svg = to_svg(figure, "Test accuracy by training images a class; the numbers are in the table below.")
    caption = "Lines are means, bands reach from the lowest to the highest seed; dashed lines are fine-tuned."
    columns = ("method", "shots", "images a class", "mean", "lowest seed", "highest seed")
    return Chart("How many labels does it take?", caption, svg, columns, rows)


def cost_chart(board: Leaderboard, extraction: ExtractionTimes) -> Chart | None:
    """Return the measure over seconds at the most labels, with the methods that nothing beats in both.

    None if the measure is not defined for any.
    """
    scores = [score for score in board.at(board.shots[-1]) if not math.isnan(score.value)]
    if not scores:
        return None
    costs = np.array([max(seconds(score, extraction), 1e-3) for score in scores])
    values = np.array([score.value for score in scores])
    names, measure = [score.name for score in scores], scores[0].measure
    unbeaten = pareto(costs, measure.sign * values)
    with PAGE.figure(WIDTH, HEIGHT) as figure:
        chosen = best_of(scores)
        named = scores.index(chosen) if chosen is not None and is_validated(scores) else None
        axes = figure.subplots()
        _draw_cost(axes, costs, values, [score.method.group for score in scores], names, named, unbeaten)
        PAGE.show_measure(axes.yaxis, measure)
        add_legend(figure, columns=2)
        svg = to_svg(
            figure, f"Test {measure.title} against seconds for every method; the numbers are in the table below."
        )
    rows = [
        (names[index], duration(costs[index]), measure.text(values[index]), "yes" if index in unbeaten else "")
        for index in np.argsort(costs, kind="stable").tolist()
    ]
    caption = f"The black line joins the methods that no other beats in both time and test {measure.title}."
    caption += "" if named is None else " The one with a name is the best on validation."
    what = measure.title if measure.metric == ACCURACY else f"a better {measure.title}"
    return Chart(f"What does {what} cost?", caption, svg, ("method", "time", measure.title, "unbeaten"), rows)


def pareto(costs: Float64Array, values: Float64Array) -> IntArray:
    """Return the indices, by rising cost, of the points that no other point beats in cost (less) and value (more)."""
    order = np.lexsort((-values, costs))
    best = np.maximum.accumulate(values[order])
    rises = np.concatenate([[True], best[1:] > best[:-1]])
    return np.asarray(order[rises])


def _draw_cost(
    axes: Axes,
    seconds: Float64Array,
    values: Float64Array,
    groups: Sequence[str],
    names: Sequence[str],
    named: int | None,
    unbeaten: IntArray,
) -> None:
    """Draw values against seconds; join the points `unbeaten`, and name the one at index `named`."""
    coloured = list(dict.fromkeys(groups))[:MOST_LINES]
    shown = [group if group in coloured else "others" for group in groups]
    for number, group in enumerate(dict.fromkeys(shown)):
        own = [name == group for name in shown]
        color, marker = (PAGE.series[number], MARKERS[number]) if group in coloured else (PAGE.quiet, ".")
        axes.scatter(seconds[own], values[own], s=26, color=color, marker=marker, label=group, alpha=0.75, linewidths=0)
    axes.plot(seconds[unbeaten], values[unbeaten], color=PAGE.ink, linewidth=1, drawstyle="steps-post", zorder=0)
    lowest, highest = seconds.min(), seconds.max()
    if named is not None:
        in_left_half = np.log(seconds[named] / lowest) < np.log(highest / lowest) / 2
        axes.annotate(
            names[named], (seconds[named], values[named]), (0, 8), textcoords="offset points",
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
    axes.grid(axis="x", color=PAGE.grid, which="major")


def contenders(board: Leaderboard, *, by_head: bool = True) -> dict[Method, int]:
    """Return the best layer of each backbone (and of each of its heads), and every fine-tuning.

    Each has the number of methods that it was chosen from on the test images themselves: 1 if on validation rows.
    """
    groups: dict[str | Method, list[MethodScore]] = {}
    for score in board.at(board.shots[-1]):
        group = score.method.group if by_head else score.method.backbone
        groups.setdefault(group if score.method.is_frozen else score.method, []).append(score)
    return {
        best.method: 1 if is_validated(scores) else len(scores)
        for scores in groups.values()
        if (best := best_of(scores)) is not None
    }


def _by_depth(board: Leaderboard) -> dict[str, list[MethodScore]]:
    """Return the scores of each backbone's best head from the first layer to the last, if there are two layers."""
    heads: dict[Method, list[MethodScore]] = {}
    for score in board.at(board.shots[-1], HEAD):
        heads.setdefault(replace(score.method, layer=""), []).append(score)
    several_pools = len({method.pool for method in heads}) > 1
    backbones: dict[str, list[MethodScore]] = {}
    for method, scores in heads.items():
        deep = [
            score
            for score in scores
            if score.method.layer != "input" and score.first.depth is not None and not math.isnan(score.value)
        ]
        ordered = sorted(deep, key=lambda score: score.first.depth or 0)
        name = f"{method.backbone}, {method.pool}" if several_pools else method.backbone
        if len(ordered) > 1 and (name not in backbones or best_of([*backbones[name], *ordered]) in ordered):
            backbones[name] = ordered
    return backbones
