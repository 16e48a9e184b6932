"""The page's charts of the few methods that are looked at closely, from what they said about each test image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.arrays import Float64Array
from pipeline.comparing.methods import MethodScore
from pipeline.evaluation.predictions import Predictions
from pipeline.evaluation.wording import four_digits, percent, three_decimals
from pipeline.reporting.charts.embedding import draw_embedding, shown_classes
from pipeline.reporting.charts.reliability import draw_reliability, reliability
from pipeline.reporting.charts.theme import MARKERS, MOST_LINES, short
from pipeline.reporting.page.method_charts import HEIGHT, WIDTH, Chart
from pipeline.reporting.page.svg import PAGE, add_legend, to_svg
from pipeline.results import MultilabelResult

MOST_CLASSES = 20
MOST_DRAWN = 500  # images, so that the page stays small


def class_chart(scores: Sequence[MethodScore], predictions: Mapping[str, Predictions], classes: Sequence[str]) -> Chart:
    """Return the recall of each class, a mark for each method; of many classes, the hardest."""
    found = {}
    for score in scores:
        said = predictions[score.first.key]
        totals = np.bincount(said.y_true, minlength=len(classes))
        right = np.bincount(said.y_true[said.right], minlength=len(classes))
        found[score.name] = np.where(totals > 0, right / np.maximum(totals, 1), np.nan)
    easiest_first = np.argsort(-next(iter(found.values())), kind="stable")
    hardest = easiest_first[totals[easiest_first] > 0][-MOST_CLASSES:]
    with PAGE.figure(WIDTH, max(2.6, 0.9 + 0.2 * len(hardest))) as figure:
        axes, heights = figure.subplots(), np.arange(len(hardest))
        for (name, recall), marker, color in zip(found.items(), MARKERS, PAGE.series, strict=False):
            axes.plot(recall[hardest], heights, marker, color=color, markersize=7, label=name, alpha=0.9)
        lowest = min(float(np.nanmin(recall[hardest])) for recall in found.values())
        axes.hlines(heights, lowest - 0.02, 1, color=PAGE.grid, linewidth=1, zorder=0)
        axes.set_yticks(heights, [short(classes[number], 24) for number in hardest])
        axes.grid(visible=False)
        PAGE.show_shares(axes.xaxis, "share of the class that is found (recall)")
        add_legend(figure)
        svg = to_svg(figure, "Recall of each class; the numbers are in the table below.")
    rows = [
        (
            classes[number],
            int(totals[number]),
            *("–" if np.isnan(recall[number]) else percent(recall[number]) for recall in found.values()),
        )
        for number in hardest[::-1]
    ]
    every = len(hardest) == (totals > 0).sum()
    caption = "The hardest class is on top." if every else f"The {len(hardest)} hardest of {len(classes)} classes."
    return Chart("Which classes are hard?", caption, svg, ("class", "test images", *found), rows)


def calibration_chart(scores: Sequence[MethodScore], predictions: Mapping[str, Predictions]) -> Chart | None:
    """Return how often a method is right at each confidence; None if no method gives probabilities.

    Probabilities are those that `predict` returns: calibrated where that was possible.
    """
    models, rows = {}, []
    for score in scores[:MOST_LINES]:
        said = predictions[score.first.key]
        if said.probability is None:
            continue
        confidence, accuracy, counts = reliability(said.probability, said.right)
        before, after = (getattr(score.first.result, name) for name in ("ece", "ece_calibrated"))
        error = f"{before:.3f}" if after is None else f"{after:.3f}, uncalibrated {before:.3f}"
        models[f"{score.name}: error {error}"] = confidence, accuracy, counts
        rows += [
            (score.name, percent(c), percent(a), int(n))
            for c, a, n in zip(confidence, accuracy, counts[counts > 0], strict=True)
        ]
    if not models:
        return None
    with PAGE.figure(WIDTH, HEIGHT) as figure:
        draw_reliability(figure.subplots(), models, PAGE)
        add_legend(figure)
        svg = to_svg(figure, "Accuracy against confidence; the numbers are in the table below.")
    caption = (
        "Test images in ten groups by confidence, with 95 % intervals. Below the dashed line, a model is surer than "
        "it should be."
    )
    columns = ("method", "confidence", "accuracy", "images")
    return Chart("Can its probabilities be trusted?", caption, svg, columns, rows)


def precision_chart(scores: Sequence[MethodScore]) -> Chart | None:
    """Return the average precision of each of several labels, a mark for each method; of many labels, the hardest."""
    found = {
        score.name: {one.label: one for one in score.first.result.labels if one.average_precision is not None}
        for score in scores
        if isinstance(score.first.result, MultilabelResult)
    }
    first = next(iter(found.values()), {})
    hardest = sorted(first.values(), key=lambda one: -(one.average_precision or 0))[-MOST_CLASSES:]
    if not hardest:
        return None
    with PAGE.figure(WIDTH, max(2.6, 0.9 + 0.2 * len(hardest))) as figure:
        axes, heights = figure.subplots(), np.arange(len(hardest))
        for (name, labels), marker, color in zip(found.items(), MARKERS, PAGE.series, strict=False):
            values = np.full(len(hardest), np.nan)  # a method that tests other images may lack a label
            ends = np.full((len(hardest), 2), np.nan)
            for row, one in enumerate(labels.get(one.label) for one in hardest):
                if one is not None:
                    values[row] = one.average_precision
                    ends[row] = one.average_precision_ci95 or (one.average_precision, one.average_precision)
            axes.errorbar(
                values, heights, xerr=np.abs(ends.T - values), fmt=marker, color=color, markersize=6, capsize=2,
                elinewidth=1, label=name, alpha=0.9,
            )  # fmt: skip
        axes.set_yticks(heights, [short(one.label, 24) for one in hardest])
        axes.set_xlabel("average precision")
        axes.grid(visible=False)
        add_legend(figure)
        svg = to_svg(figure, "Average precision of each label; the numbers are in the table below.")
    rows = [
        (
            one.label,
            one.positives,
            *(three_decimals(labels[one.label].average_precision if one.label in labels else None) for labels in own),
        )
        for own in [found.values()]
        for one in hardest[::-1]
    ]
    n_labels = scores[0].first.n_classes
    every = "The hardest label is on top" if len(hardest) == n_labels else f"{len(hardest)} of {n_labels} labels"
    caption = f"{every}; bars are 95 % intervals."
    return Chart("Which labels are hard?", caption, svg, ("label", "test images", *found), rows)


def number_chart(scores: Sequence[MethodScore], predictions: Mapping[str, Predictions]) -> Chart:
    """Return predicted numbers over the true ones, a mark for each method."""
    rows: list[tuple[str, ...]] = []
    target = scores[0].first.result.target or "number"
    with PAGE.figure(WIDTH, 4.2) as figure:
        axes = figure.subplots()
        for score, marker, color in zip(scores, MARKERS, PAGE.series, strict=False):
            said = predictions[score.first.key]
            drawn = np.sort(np.random.default_rng(0).permutation(len(said.uris))[:MOST_DRAWN])
            axes.plot(
                said.y_true[drawn], said.y_pred[drawn], marker, color=color, markersize=4, alpha=0.4, linewidth=0,
                label=score.name,
            )  # fmt: skip
            errors = np.quantile(np.abs(said.y_pred - said.y_true), (0.5, 0.9, 1.0))
            rows.append((score.name, *map(four_digits, errors.tolist())))
        ends = [
            min(said.y_true.min() for said in predictions.values()),
            max(s.y_true.max() for s in predictions.values()),
        ]
        axes.plot(ends, ends, color=PAGE.quiet, linestyle="--", linewidth=1, label="right")
        axes.set(xlabel=f"true {target}", ylabel=f"predicted {target}")
        add_legend(figure)
        svg = to_svg(figure, "Predicted against true numbers; how far off they are is in the table below.")
    columns = ("method", "half are off by at most", "nine of ten by at most", "all by at most")
    images = max(len(said.uris) for said in predictions.values())
    caption = f"A mark for each of {MOST_DRAWN} test images." if images > MOST_DRAWN else "A mark for each test image."
    return Chart("How far off are the predictions?", caption, svg, columns, rows)


def map_chart(positions: Float64Array, said: Predictions, classes: Sequence[str], layer: str) -> Chart:
    """Return test images where t-SNE puts their features, (n, 2), coloured by class, with mistakes ringed."""
    counts = np.bincount(said.y_true, minlength=len(classes))
    mistakes = np.bincount(said.y_true[~said.right], minlength=len(classes))
    named = [number for number in shown_classes(said.y_true, said.y_pred, len(classes)) if counts[number]]
    with PAGE.figure(WIDTH, 4.2) as figure:
        axes = figure.subplots()
        draw_embedding(axes, positions, said.y_true, said.y_pred, classes, PAGE)
        for number in named:
            middle = np.median(positions[said.y_true == number], axis=0)
            axes.annotate(classes[number], middle, weight="bold", fontsize=10, ha="center")
        svg = to_svg(figure, f"Map of the test images by their features at {layer}; mistakes are ringed.")
    rows = [(name, int(counts[number]), int(mistakes[number])) for number, name in enumerate(classes)]
    caption = f"t-SNE of the features at {layer}: images that look alike to the network are close. Rings are mistakes."
    if len(named) < np.count_nonzero(counts):
        caption += f" The {len(named)} classes that are confused most are coloured."
    return Chart("Which images look alike to the network?", caption, svg, ("class", "test images", "mistakes"), rows)
