"""The demo: handwritten digits, the embedded network, and a picture of where in its depth the strokes live."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.evaluation.intervals import wilson
from pipeline.evaluation.predictions import Predictions
from pipeline.extract import extract
from pipeline.fit import FitReport, fit
from pipeline.images.decode import decode
from pipeline.images.sources.registry import open_source
from pipeline.reporting.charts.confusion import confusion_counts, confusion_matrix
from pipeline.reporting.charts.depth import depth_curve
from pipeline.reporting.charts.strip import image_strip
from pipeline.results import ExtractResult, FitResult, Progress

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure

SEEDS = (0, 1, 2)
MISTAKES = 6


@dataclass(frozen=True)
class DemoReport:
    """What the demo found, in numbers, in words, and where it put the files."""

    caches: list[ExtractResult]
    results: list[FitResult]
    summary: str
    files: dict[str, str]


def demo(folder: str | Path = "thawline-demo", progress: Progress | None = None) -> DemoReport:
    """Extract every stage of the embedded network over scikit-learn's digits, fit logistic regression on each, draw.

    Parameters
    ----------
    folder : str or Path, default "thawline-demo"
        Gets ``cache/``, ``digits.skops`` and ``digits.png``; a second run reuses the cache.
    progress : callable, optional
        ``progress(done, total, text)``.

    Returns
    -------
    DemoReport
    """
    folder = Path(folder)
    cache, model, picture = folder / "cache", folder / "digits.skops", folder / "digits.png"
    caches = extract("digits", layers=("stages", "penultimate", "input"), pool="grid2", output=cache, progress=progress)
    report = fit(cache, seeds=SEEDS, save=model, progress=progress)
    depth = [layer for layer in dict.fromkeys(result.layer for result in report.results) if layer != "input"]
    accuracy = {layer: _accuracies(report.results, layer) for layer in [*depth, "input"]}
    _draw(report, depth, accuracy, picture)
    files = {"cache": str(cache), "model": str(model), "picture": str(picture)}
    return DemoReport(caches, report.results, _summary(report, depth, accuracy), files)


def _accuracies(results: Sequence[FitResult], layer: str) -> np.ndarray:
    return np.array([result.accuracy for result in results if result.layer == layer])


def _summary(report: FitReport, depth: Sequence[str], accuracy: dict[str, np.ndarray]) -> str:
    """Say what the curve shows, whatever it shows."""
    means = {layer: values.mean() for layer, values in accuracy.items()}
    peak = max(depth, key=lambda layer: means[layer])
    first, last = depth[0], depth[-1]
    curve = f"Accuracy: {means[first]:.3f} at {first}, {means[peak]:.3f} at {peak}, {means[last]:.3f} at {last}"
    against = f"raw pixels give {means['input']:.3f}"
    if peak not in (first, last) and means[peak] > means["input"]:
        lesson = "digits are made of strokes, which the middle of the network detects; its end knows objects instead"
    else:
        lesson = "here the curve has no peak in the middle above the raw pixels"
    kept = report.results[report.best]
    low, high = kept.accuracy_ci95
    model = (
        f"The model kept is the best on validation images: {kept.head} on {kept.layer}, {kept.accuracy:.3f} "
        f"on {kept.n_test} test images (95 % interval {low:.3f}–{high:.3f})."
    )
    return f"{curve}; {against}: {lesson}. {model}"


def _draw(report: FitReport, depth: Sequence[str], accuracy: dict[str, np.ndarray], path: Path) -> None:
    """Draw the curve, the kept model's confusion matrix, and the mistakes it was surest of."""
    from matplotlib.figure import Figure  # of its own: no display and no global state are touched

    figure = Figure(figsize=(14, 7.5), layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(7, 6))[0]
    top, bottom = right.subfigures(2, 1, squeeze=False, height_ratios=(5, 2))[:, 0]

    tests = report.results[0].n_test
    values = np.array([accuracy[layer] for layer in depth])
    intervals = np.array([wilson(round(mean * tests), tests) for mean in values.mean(axis=1)])
    axes = left.subplots()
    depth_curve(axes, depth, values, intervals, ("raw pixels", float(accuracy["input"].mean())))
    axes.set_title(f"Handwritten digits by depth\nlogistic regression, {len(SEEDS)} seeds of {tests} test images")

    kept, predictions = report.results[report.best], report.predictions[report.best]
    counts = confusion_counts(predictions.y_true, predictions.y_pred, len(report.classes))
    axes = top.subplots()
    confusion_matrix(axes, counts, report.classes)
    axes.set_title(f"{kept.head} on {kept.layer}, seed {kept.seed}: {kept.accuracy:.3f}")
    _draw_mistakes(bottom, report, predictions)
    figure.savefig(path, dpi=130)


def _draw_mistakes(figure: SubFigure, report: FitReport, predictions: Predictions) -> None:
    surest = np.flatnonzero(predictions.y_pred != predictions.y_true)
    sureness = np.ones(len(predictions.uris)) if predictions.probability is None else predictions.probability
    surest = surest[np.argsort(-sureness[surest], kind="stable")][:MISTAKES]
    source = open_source("digits")
    items = {item.uri: item for item in source.items}
    images = [decode(source.read(items[str(predictions.uris[row])])).image for row in surest]
    names = report.classes
    titles = [
        f"{names[predictions.y_true[row]]} called {names[predictions.y_pred[row]]}\np = {sureness[row]:.2f}"
        for row in surest
    ]
    figure.suptitle("Its surest mistakes" if titles else "It made no mistake", fontsize=11)
    image_strip(figure.subplots(1, max(len(titles), 4)).ravel(), images, titles)
