"""The pictures of a fit, as PNG and SVG files."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from pipeline.evaluation.wording import METRIC_TITLES, Measure, metric_text
from pipeline.fit import FitReport
from pipeline.reporting.charts.accuracy import Line, depth_line, draw_depth, draw_labels
from pipeline.reporting.charts.confusion import confusion_figure
from pipeline.reporting.charts.embedding import embedding_figure
from pipeline.reporting.charts.reliability import reliability_figure
from pipeline.reporting.charts.theme import MOST_LINES, SCREEN, save_figure, short
from pipeline.reporting.charts.values import precisions_figure, residuals_figure
from pipeline.results import FitResult, HeadResult, MultilabelResult, RegressionResult

MOST_MAPPED = 1500  # test images on the map; with more, t-SNE takes long and the map shows less
_FEWEST_MAPPED = 5


def draw_fit(report: FitReport, folder: Path) -> list[Path]:
    """Draw the results, and the predictions of the best one on its layer; return the paths of the files.

    They are ``confusion``, ``depth`` (of several layers), ``budget`` (of several numbers of shots), ``reliability`` (of
    heads with probabilities) and ``embedding``; of numbers ``residuals`` and ``depth``; of several labels ``labels``
    and ``depth``. Each is a PNG and an SVG. The folder exists; files of the same names are replaced.
    """
    kept, predictions = report.results[report.best], report.predictions[report.best]
    if not isinstance(kept, FitResult):
        return _draw_values(report, kept, folder)
    title = f"{kept.head} on {kept.layer}, {kept.accuracy:.3f} on {kept.n_test} test images"
    paths = save(confusion_figure(predictions.y_true, predictions.y_pred, report.classes, title), folder, "confusion")
    plain = [result for result in report.results if not result.columns]
    if len({result.layer for result in plain}) > 1:
        paths += save(depth_figure(plain, report.may_be_best), folder, "depth")
    if len({result.shots for result in report.results}) > 1:
        paths += save(labels_figure(report.results, len(report.classes)), folder, "budget")
    if predictions.probabilities is not None:
        compared = {"as trained": predictions.probabilities}
        if predictions.calibrated is not None:
            compared["calibrated"] = predictions.calibrated
        paths += save(reliability_figure(predictions.y_true, compared), folder, "reliability")
    if len(predictions.uris) >= _FEWEST_MAPPED:
        rng = np.random.default_rng(0)
        drawn = np.sort(rng.permutation(len(predictions.uris))[:MOST_MAPPED])
        row_of = {uri: row for row, uri in enumerate(report.layer.table.uris.tolist())}
        rows = np.array([row_of[uri] for uri in predictions.uris[drawn].tolist()])
        columns = (predictions.y_true[drawn], predictions.y_pred[drawn])
        mapped = embedding_figure(report.layer.features(rows), *columns, report.classes, f"{kept.layer}: test images")
        paths += save(mapped, folder, "embedding")
    return paths


def _draw_values(report: FitReport, kept: RegressionResult | MultilabelResult, folder: Path) -> list[Path]:
    """Draw the results of a fit whose heads predict numbers or several labels."""
    value = metric_text(kept.metric, getattr(kept, kept.metric))
    title = f"{kept.head} on {kept.layer}, {METRIC_TITLES[kept.metric]} {value} on {kept.n_test} test images"
    paths: list[Path] = []
    if isinstance(kept, RegressionResult):
        predictions = report.predictions[report.best]
        target = kept.target or "value"
        drawn = residuals_figure(predictions.y_true, predictions.y_pred, target, title)
        paths += save(drawn, folder, "residuals")
    elif any(one.average_precision is not None for one in kept.labels):
        paths += save(precisions_figure(kept.labels, title), folder, "labels")
    points = _points(report)
    if len({layer for _, layer, *_ in points}) > 1:
        paths += save(_metric_by_depth(report, points), folder, "depth")
    return paths


def _points(report: FitReport) -> list[tuple[str, str, float, tuple[float, float]]]:
    """Return head, layer, the metric that parameters were chosen by and its interval, where it is defined on test.

    Layers with columns of a table are left out.
    """
    metric, plain = report.results[0].metric, {one.layer for one in report.results if not one.columns}
    points = [(one.head, one.layer, one.mean, one.ci95) for one in report.summary] or [
        (one.head, one.layer, getattr(one, metric), getattr(one, f"{metric}_ci95")) for one in report.results
    ]
    return [
        (head, layer, value, ends or (value, value))
        for head, layer, value, ends in points
        if layer in plain and value is not None and not math.isnan(value)
    ]


def _metric_by_depth(report: FitReport, points: Sequence[tuple[str, str, float, tuple[float, float]]]) -> Figure:
    """Return the points over the layers, a line for each head."""
    results, metric = report.results, report.results[0].metric
    layers = sorted(dict.fromkeys(layer for _, layer, *_ in points), key=lambda layer: layer != "input")
    lines = []
    for head in list(dict.fromkeys(head for head, *_ in points))[:MOST_LINES]:
        own = sorted((layers.index(layer), value, ends) for name, layer, value, ends in points if name == head)
        among = [(layers[x], head, "all") in report.may_be_best for x, _, _ in own] if report.may_be_best else ()
        places, values, intervals = (list(column) for column in zip(*own, strict=True))
        lines.append(Line(head, places, values, intervals, best=among))
    with SCREEN.figure(max(8, 0.6 * len(layers) + 4), 4.6) as figure:
        axes = figure.subplots()
        draw_depth(axes, lines, SCREEN, measure=Measure(metric))
        axes.set_xticks(np.arange(len(layers)), [short(layer, 28) for layer in layers], rotation=30, ha="right")
        axes.set_title(f"{METRIC_TITLES[metric]} by layer, with 95 % intervals\n{_subject(results)}")
        _add_legend(figure, lines)
    return figure


def depth_figure(results: Sequence[FitResult], best: Collection[tuple[str, str, int | str]] = ()) -> Figure:
    """Return accuracy over the layers of one backbone in the order of the results, a line for each head and shots.

    `best` is that of `pipeline.fit.FitReport.may_be_best`.
    """
    layers = sorted(dict.fromkeys(result.layer for result in results), key=lambda layer: layer != "input")
    lines = []
    for label, members in _grouped(results, lambda result: (result.head, result.shots)).items():
        groups = {x: [result for result in members if result.layer == layer] for x, layer in enumerate(layers)}
        lines.append(depth_line(label, {x: group for x, group in groups.items() if group}, best))
    dots = ", dots are seeds" if len(lines) == 1 and len({result.seed for result in results}) > 1 else ""
    with SCREEN.figure(max(8, 0.6 * len(layers) + 4), 4.6) as figure:
        axes = figure.subplots()
        draw_depth(axes, lines, SCREEN)
        axes.set_xticks(np.arange(len(layers)), [short(layer, 28) for layer in layers], rotation=30, ha="right")
        among = ", filled points may be the best" if best else ""
        axes.set_title(f"Accuracy by layer, with 95 % intervals{among}{dots}\n{_subject(results)}")
        _add_legend(figure, lines)
    return figure


def labels_figure(results: Sequence[FitResult], n_classes: int) -> Figure:
    """Return accuracy over the number of training images a class, a line for each layer and head.

    The line goes through the means over seeds, the band from the lowest to the highest seed. Shots of ``"all"`` stand
    at the mean number of images a class.
    """

    def position(result: FitResult) -> float:
        return (result.n_train + result.n_val) / n_classes if result.shots == "all" else float(result.shots)

    lines = []
    for label, members in _grouped(results, lambda result: (result.layer, result.head)).items():
        shots = sorted({r.shots for r in members}, key=lambda count: np.inf if count == "all" else count)
        groups = [[r for r in members if r.shots == count] for count in shots]
        positions = [float(np.mean([position(r) for r in group])) for group in groups]
        spans = [(min(r.accuracy for r in group), max(r.accuracy for r in group)) for group in groups]
        lines.append(Line(label, positions, [float(np.mean([r.accuracy for r in group])) for group in groups], spans))
    seeds = len({result.seed for result in results})
    band = f", band over {seeds} seeds" if seeds > 1 else ""
    with SCREEN.figure(7.2, 4.6) as figure:
        axes = figure.subplots()
        draw_labels(axes, lines, {position(result): str(result.shots) for result in results}, SCREEN)
        axes.set_title(f"Accuracy by number of labels{band}\n{_subject(results)}")
        _add_legend(figure, lines)
    return figure


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write ``NAME.png`` and ``NAME.svg``, and return their paths."""
    paths = [folder / f"{name}.{suffix}" for suffix in ("png", "svg")]
    for path in paths:
        save_figure(figure, path, dpi=150)
    return paths


def _grouped(
    results: Sequence[FitResult], key: Callable[[FitResult], Sequence[Hashable]]
) -> dict[str, list[FitResult]]:
    """Group results by those parts of `key` that differ, and keep the groups whose best results are highest."""
    keys = [key(result) for result in results]
    differ = [index for index in range(len(keys[0])) if len({k[index] for k in keys}) > 1]
    groups: dict[str, list[FitResult]] = {}
    for result, found in zip(results, keys, strict=True):
        label = ", ".join(_part_text(found[index]) for index in differ or [len(found) - 1])
        groups.setdefault(label, []).append(result)
    kept = sorted(groups, key=lambda label: -max(r.accuracy for r in groups[label]))[:MOST_LINES]
    return {label: members for label, members in groups.items() if label in kept}


def _part_text(part: Hashable) -> str:
    return f"{part} shots" if isinstance(part, int) else ("all labels" if part == "all" else short(str(part), 40))


def _subject(results: Sequence[HeadResult]) -> str:
    """Return backbone and pooling for a title's second line."""
    return ", ".join(dict.fromkeys(f"{r.backbone}, {r.pool} pooling" for r in results))


def _add_legend(figure: Figure, lines: Sequence[Line]) -> None:
    if len(lines) > 1:
        figure.legend(loc="outside right center")
