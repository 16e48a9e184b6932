"""All pictures that a fit has something to show for, as PNG and SVG."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipeline.evaluation.rows import Layer
from pipeline.fit import FitReport
from pipeline.reporting.charts.confusion import confusion_figure
from pipeline.reporting.charts.curves import budget_figure, depth_figure
from pipeline.reporting.charts.embedding import embedding_figure
from pipeline.reporting.charts.reliability import reliability_figure
from pipeline.reporting.charts.style import save

MOST_MAPPED = 1500
"""Test images on the map; t-SNE of more takes long, and shows less."""
_FEWEST_MAPPED = 5


def draw_fit(report: FitReport, layer: Layer, folder: Path) -> list[Path]:
    """Draw the results, and the kept model's predictions.

    Parameters
    ----------
    report : FitReport
        What `fit` returned.
    layer : Layer
        That of the kept result.
    folder : Path
        Exists; files of the same names are replaced.

    Returns
    -------
    list of Path
        ``confusion``, ``depth`` (of several layers), ``budget`` (of several numbers of shots), ``reliability`` (of
        heads with probabilities) and ``embedding``, each as PNG and SVG.
    """
    kept, predictions = report.results[report.best], report.predictions[report.best]
    title = f"{kept.head} on {kept.layer}, {kept.accuracy:.3f} on {kept.n_test} test images"
    paths = save(confusion_figure(predictions.y_true, predictions.y_pred, report.classes, title), folder, "confusion")
    if len({result.layer for result in report.results}) > 1:
        paths += save(depth_figure(report.results), folder, "depth")
    if len({result.shots for result in report.results}) > 1:
        paths += save(budget_figure(report.results, len(report.classes)), folder, "budget")
    if predictions.probabilities is not None:
        compared = {"as trained": predictions.probabilities}
        if predictions.calibrated is not None:
            compared["calibrated"] = predictions.calibrated
        paths += save(reliability_figure(predictions.y_true, compared), folder, "reliability")
    if len(predictions.uris) >= _FEWEST_MAPPED:
        rng = np.random.default_rng(0)
        drawn = np.sort(rng.permutation(len(predictions.uris))[:MOST_MAPPED])
        row_of = {uri: row for row, uri in enumerate(layer.table.uris.tolist())}
        rows = np.array([row_of[uri] for uri in predictions.uris[drawn].tolist()])
        columns = (predictions.y_true[drawn], predictions.y_pred[drawn])
        mapped = embedding_figure(layer.features(rows), *columns, report.classes, f"{kept.layer}: test images")
        paths += save(mapped, folder, "embedding")
    return paths
