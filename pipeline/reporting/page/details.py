"""One method in detail: how well it predicts each class, label or range of numbers, and its mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.comparing.methods import MethodScore
from pipeline.evaluation.metrics import count
from pipeline.evaluation.predictions import Predictions
from pipeline.evaluation.wording import four_digits, percent, three_decimals
from pipeline.options import CLASSIFICATION, MULTILABEL
from pipeline.reporting.charts.confusion import confusion_counts
from pipeline.reporting.page.pictures import Album, farthest_off, most_wrong, worst_confusions
from pipeline.reporting.terminal.neighbour_tables import price_lines
from pipeline.results import FitResult, MultilabelResult

MOST_IN_MATRIX = 40  # with more classes than this the confusion matrix would be unreadable and is left out
MOST_RANGES = 8


class Cell(NamedTuple):
    """A cell of a table; `share`, from 0 to 1, is drawn as a bar behind the text."""

    text: str
    share: float | None = None


def details(score: MethodScore, predictions: Predictions, classes: Sequence[str], album: Album) -> dict[str, Any]:
    """Return what the page says about the first seed of a method; `predictions` are those of that seed."""
    seed = f", seed {score.first.result.seed}" if len(score.by_seed) > 1 else ""
    found = {"title": f"{score.name}{seed}", "classes": classes, "counts": [], "price": None, "confusions": []}
    if score.task == CLASSIFICATION:
        return found | _of_classes(score, predictions, classes, album)
    return found | (_of_labels if score.task == MULTILABEL else _of_numbers)(score, predictions, classes, album)


def _of_classes(score: MethodScore, predictions: Predictions, classes: Sequence[str], album: Album) -> dict[str, Any]:
    """Return recall, precision and F1 of each class, the hardest first, the confusion matrix, and the mistakes."""
    counts = count(predictions.y_true, predictions.y_pred, len(classes))
    rows = []
    for number, name in enumerate(classes):
        true, predicted, right = (int(column[number]) for column in counts)
        recall = right / true if true else 0.0
        shown = percent(recall) if true else "–"
        precision = percent(right / predicted) if predicted else "–"
        f1 = percent(2 * right / (true + predicted)) if true + predicted else "–"
        rows.append((recall, (Cell(name), Cell(str(true)), Cell(shown, recall), Cell(precision), Cell(f1))))
    result = score.first.result
    price = result.leak_price if isinstance(result, FitResult) else None
    drawn = len(classes) <= MOST_IN_MATRIX
    matrix = "The matrix has true classes in its rows and predicted classes in its columns. " if drawn else ""
    return {
        "caption": f"{matrix}The table lists classes by recall, the hardest first.",
        "columns": ("class", "images", "recall", "precision", "F1"),
        "rows": [row for _, row in sorted(rows, key=lambda row: row[0])],
        "counts": confusion_counts(predictions.y_true, predictions.y_pred, len(classes)).tolist() if drawn else [],
        "price": price,
        "price_lines": price_lines(price) if price else [],
        "confusions": worst_confusions(predictions, classes, album),
        "worst": [],
    }


def _of_labels(score: MethodScore, predictions: Predictions, classes: Sequence[str], album: Album) -> dict[str, Any]:
    """Return the average precision of each label, the hardest first, and the images with most wrong labels."""
    result = score.first.result
    labels = result.labels if isinstance(result, MultilabelResult) else []
    rows = []
    for one in sorted(labels, key=lambda one: 2.0 if one.average_precision is None else one.average_precision):
        ends = "–".join(three_decimals(end) for end in one.average_precision_ci95 or ())
        precision = Cell(three_decimals(one.average_precision), one.average_precision)
        cells = (Cell(ends or "-"), Cell(three_decimals(one.f1)), Cell(three_decimals(one.threshold)))
        rows.append((Cell(one.label), Cell(str(one.positives)), precision, *cells))
    return {
        "caption": "The table lists labels by average precision, the hardest first. A label is predicted from its "
        "threshold on.",
        "columns": ("label", "images", "average precision", "95 %", "F1", "threshold"),
        "rows": rows,
        "worst": most_wrong(predictions, classes, album),
        "worst_caption": "The images with most wrong labels.",
    }


def _of_numbers(score: MethodScore, predictions: Predictions, _: Sequence[str], album: Album) -> dict[str, Any]:
    """Return the errors over ranges of the true number, and the images that are farthest off."""
    values = np.unique(predictions.y_true)
    if len(values) > MOST_RANGES:
        values = np.unique(np.quantile(predictions.y_true, np.linspace(0, 1, MOST_RANGES, endpoint=False)))
    of_row = np.searchsorted(values, predictions.y_true, "right")
    rows = []
    for number in np.unique(of_row):
        own = of_row == number
        true, errors = predictions.y_true[own], predictions.y_pred[own] - predictions.y_true[own]
        told = " to ".join(dict.fromkeys(f"{end:.4g}" for end in (true.min(), true.max())))
        means = (float(np.abs(errors).mean()), float(errors.mean()))
        rows.append((Cell(told), Cell(str(own.sum())), *(Cell(four_digits(value)) for value in means)))
    return {
        "caption": "Errors by the true number: how far predictions are off, and whether they are too high (above 0) or "
        "too low.",
        "columns": (score.first.result.target or "true number", "images", "mean absolute error", "mean error"),
        "rows": rows,
        "worst": farthest_off(predictions, album),
        "worst_caption": "The images whose predictions are farthest off.",
    }
