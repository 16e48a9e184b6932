"""The demo: handwritten digits, the embedded network, and a picture of the depth at which it detects strokes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.extract import extract
from pipeline.fit import FitReport, fit
from pipeline.images.decode import decode
from pipeline.images.sources.registry import open_source
from pipeline.reporting.charts.accuracy import depth_line, draw_depth
from pipeline.reporting.charts.confusion import confusion_counts, draw_confusion
from pipeline.reporting.charts.theme import SCREEN, save_figure
from pipeline.results import ExtractResult, FitResult, Progress

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure

SEEDS = (0, 1, 2)
MISTAKES = 6


@dataclass(frozen=True)
class DemoReport:
    """What the demo found, in numbers and in words, and the files it wrote."""

    caches: list[ExtractResult]
    results: list[FitResult]
    summary: str
    files: dict[str, str]


def demo(folder: str | Path = "thawline-demo", progress: Progress | None = None) -> DemoReport:
    """Extract all stages of the embedded network from scikit-learn's digits, fit logistic regression to each, draw.

    The folder gets ``cache/``, ``digits.skops`` and ``digits.png``; a second run reuses the cache.
    """
    folder = Path(folder)
    cache, model, picture = folder / "cache", folder / "digits.skops", folder / "digits.png"
    caches = extract("digits", layers=("stages", "penultimate", "input"), pool="grid2", output=cache, progress=progress)
    report = fit(cache, seeds=SEEDS, save=model, progress=progress)
    by_layer: dict[str, list[FitResult]] = {}
    for result in report.results:
        by_layer.setdefault(result.layer, []).append(result)
    means = {layer: float(np.mean([result.accuracy for result in results])) for layer, results in by_layer.items()}
    raw = means.pop("input")
    _draw(report, [by_layer[layer] for layer in means], raw, picture)
    files = {"cache": str(cache), "model": str(model), "picture": str(picture)}
    return DemoReport(caches, report.results, _summary(report, means, raw), files)


def _summary(report: FitReport, means: dict[str, float], raw: float) -> str:
    """Say in words what the curve shows, whether or not the best layers are in the middle."""
    first, *_, last = means
    kept = report.results[report.best]
    shown = ", ".join(f"{means[layer]:.3f} at {layer}" for layer in dict.fromkeys((first, kept.layer, last)))
    best = [layer for layer in [*means, "input"] if (layer, kept.head, kept.shots) in report.may_be_best]
    curve = (
        f"Accuracy: {shown}; raw pixels give {raw:.3f}. On these test images, any of {', '.join(best)} may be the best."
    )
    if not {first, last, "input"} & set(best):
        lesson = "Digits are made of strokes, which the middle of the network detects; its end knows objects instead."
    else:
        lesson = "So the middle of the network is not measurably better here than its ends or the raw pixels."
    low, high = kept.accuracy_ci95
    model = (
        f"The model kept is the best on validation images: {kept.head} on {kept.layer}, {kept.accuracy:.3f} "
        f"on {kept.n_test} test images (95 % interval {low:.3f}–{high:.3f})."
    )
    return f"{curve} {lesson} {model}"


def _draw(report: FitReport, layers: Sequence[Sequence[FitResult]], raw: float, path: Path) -> None:
    """Draw the curve, the kept model's confusion matrix, and the mistakes it was surest of."""
    with SCREEN.figure(14, 7.5) as figure:
        left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(7, 6))[0]
        top, bottom = right.subfigures(2, 1, squeeze=False, height_ratios=(5, 2))[:, 0]
        axes = left.subplots()
        words = "mean over seeds (dots), 95 % interval; filled: may be the best"
        line = depth_line(words, dict(enumerate(layers)), report.may_be_best)
        draw_depth(axes, [line], SCREEN, ("raw pixels", raw))
        axes.set_xticks(line.x, line.names, rotation=30, ha="right")
        tests = layers[0][0].n_test
        axes.set_title(f"Handwritten digits by depth\nlogistic regression, {len(SEEDS)} seeds of {tests} test images")
        axes.legend(loc="lower center")

        kept, predictions = report.results[report.best], report.predictions[report.best]
        axes = top.subplots()
        counts = confusion_counts(predictions.y_true, predictions.y_pred, len(report.classes))
        draw_confusion(axes, counts, report.classes)
        axes.set_title(f"{kept.head} on {kept.layer}, seed {kept.seed}: {kept.accuracy:.3f}")
        _draw_mistakes(bottom, report)
        save_figure(figure, path, dpi=130)


def _draw_mistakes(figure: SubFigure, report: FitReport) -> None:
    predictions, names = report.predictions[report.best], report.classes
    wrong = np.flatnonzero(predictions.y_pred != predictions.y_true)
    confidence = np.ones(len(predictions.uris)) if predictions.probability is None else predictions.probability
    surest: Sequence[int] = wrong[np.argsort(-confidence[wrong], kind="stable")][:MISTAKES].tolist()
    source = open_source("digits")
    items = {item.uri: item for item in source.items}
    panels = figure.subplots(1, max(len(surest), 4)).ravel()
    for axes in panels:
        axes.axis("off")
    for axes, row in zip(panels, surest, strict=False):
        axes.imshow(decode(source.read(items[str(predictions.uris[row])])).image, cmap="gray")
        called = f"{names[predictions.y_true[row]]} called {names[predictions.y_pred[row]]}"
        axes.set_title(f"{called}\np = {confidence[row]:.2f}", fontsize=9)
    figure.suptitle("Its surest mistakes" if surest else "It made no mistake", fontsize=11)
