"""Charts of the few methods that are looked at closely, from what they said about each test image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.comparing.answer import percent
from pipeline.comparing.methods import Score
from pipeline.evaluation.predictions import Predictions
from pipeline.reporting.charts.reliability import reliability
from pipeline.reporting.page.method_charts import MOST_LINES, Chart
from pipeline.reporting.page.svg import GRID, INK, MARKERS, QUIET, SERIES, legend_above, themed, to_svg

MOST_BARS = 20


def class_chart(scores: Sequence[Score], judged: Mapping[str, Predictions], classes: Sequence[str]) -> Chart | None:
    """Share of each class that is found, a mark for each method; of many classes the hardest; None without any."""
    found = {}
    for score in scores:
        said = judged[score.first.key]
        totals = np.bincount(said.y_true, minlength=len(classes))
        right = np.bincount(said.y_true[said.right], minlength=len(classes))
        found[score.name] = np.where(totals > 0, right / np.maximum(totals, 1), np.nan)
    worst = np.argsort(-next(iter(found.values())), kind="stable")
    worst = worst[totals[worst] > 0][-MOST_BARS:]
    with themed(5.4, max(2.6, 0.9 + 0.2 * len(worst))) as (figure, axes):
        places = np.arange(len(worst))
        for number, (method, recall) in enumerate(found.items()):
            axes.plot(
                recall[worst], places, MARKERS[number], color=SERIES[number], markersize=7, label=method, alpha=0.9
            )
        low = min(float(np.nanmin(recall[worst])) for recall in found.values())
        axes.hlines(places, low - 0.02, 1, color=GRID, linewidth=1, zorder=0)
        axes.set_yticks(places, [classes[number][:24] for number in worst])
        axes.grid(visible=False)
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g}")
        axes.set_xlabel("share of the class that is found (recall), %")
        legend_above(figure)
        svg = to_svg(figure, "Recall of each class; the numbers are in the table below.")
    shown = list(found.items())
    rows = [
        (classes[number], int(totals[number]), *("–" if np.isnan(r[number]) else percent(r[number]) for _, r in shown))
        for number in worst[::-1]
    ]
    caption = (
        "The hardest on top." if len(worst) == (totals > 0).sum() else f"The {len(worst)} hardest of {len(classes)}."
    )
    return Chart("Which classes are hard?", caption, svg, ("class", "test images", *found), rows)


def calibration_chart(scores: Sequence[Score], judged: Mapping[str, Predictions]) -> Chart | None:
    """How often a method is right when it is so sure; None where no method gives probabilities.

    Probabilities are those that `predict` tells: calibrated where that could be done.
    """
    rows = []
    drawn = 0
    with themed(5.4, 3.5) as (figure, axes):
        axes.plot([0, 1], [0, 1], color=QUIET, linestyle="--", linewidth=1, label="as sure as right")
        for score in scores[:MOST_LINES]:
            said = judged[score.first.key]
            if said.probability is None:
                continue
            sure, right, counts = reliability(said.probability, said.right)
            axes.plot(
                sure, right, color=SERIES[drawn], marker=MARKERS[drawn], markersize=5, linewidth=1.8,
                label=f"{score.name}: {_errors(score)}",
            )  # fmt: skip
            rows += [
                (score.name, percent(s), percent(r), int(c))
                for s, r, c in zip(sure, right, counts[counts > 0], strict=True)
            ]
            drawn += 1
        if not drawn:
            return None
        axes.set_xlabel("mean probability of the predicted class")
        axes.set_ylabel("share that is right")
        axes.set(xlim=(0, 1.02), ylim=(0, 1.02))
        legend_above(figure)
        svg = to_svg(
            figure, "Share of right answers against predicted probability; the numbers are in the table below."
        )
    caption = "Ten groups of test images by probability. Below the dashed line a model is surer than it is right."
    return Chart("Can its probabilities be trusted?", caption, svg, ("method", "sure", "right", "images"), rows)


def map_chart(places: NDArray[np.float64], said: Predictions, classes: Sequence[str], layer: str) -> Chart:
    """Test images as t-SNE lays out their features, (n, 2), coloured by class, mistakes ringed."""
    counts = np.bincount(said.y_true, minlength=len(classes))
    rows = []
    with themed(5.4, 4.2) as (figure, axes):
        for number in range(len(classes)):
            own = said.y_true == number
            color = SERIES[number % MOST_LINES]
            marker = MARKERS[(number // MOST_LINES + number) % len(MARKERS)]
            axes.scatter(places[own, 0], places[own, 1], s=16, color=color, marker=marker, alpha=0.8, linewidths=0)
            if counts[number] and len(classes) <= 30:
                axes.annotate(classes[number], np.median(places[own], axis=0), weight="bold", fontsize=10, ha="center")
            wrong = int((own & ~said.right).sum())
            rows.append((classes[number], int(counts[number]), wrong))
        axes.scatter(
            places[~said.right, 0], places[~said.right, 1], s=52, facecolors="none", edgecolors=INK, linewidths=1
        )
        axes.set(xticks=[], yticks=[])
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        svg = to_svg(figure, f"Map of the test images by their features at {layer}; mistakes are ringed.")
    caption = f"t-SNE of the features at {layer}: near images look alike to the network. Rings are mistakes."
    return Chart("What does the network see as alike?", caption, svg, ("class", "test images", "mistakes"), rows)


def _errors(score: Score) -> str:
    """Return the calibration error, before and after calibration where there was one."""
    before, after = score.first.result.ece, score.first.result.ece_calibrated
    return f"error {before:.3f}" if after is None else f"error {after:.3f}, uncalibrated {before:.3f}"
