"""The report of a comparison: one HTML page that loads nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from features_cache import UNREADABLE, CacheFile
from pipeline.comparing.answer import (
    ExtractionTimes,
    answer,
    duration,
    extraction_seconds,
    percent,
    points,
    seconds,
)
from pipeline.comparing.features import Features
from pipeline.comparing.folder import RunFolder
from pipeline.comparing.methods import Leaderboard, MethodScore, leaderboards, shots_order
from pipeline.comparing.paired import LEVEL, compare_scores
from pipeline.evaluation.metrics import count
from pipeline.evaluation.predictions import Predictions
from pipeline.images.sources.registry import ImageSource
from pipeline.options import METRICS
from pipeline.reporting.charts.confusion import confusion_counts
from pipeline.reporting.page.method_charts import contenders, cost_chart, depth_chart, labels_chart
from pipeline.reporting.page.model_charts import calibration_chart, class_chart, map_chart
from pipeline.reporting.page.pictures import Album, lay_out_map, leaks, worst_confusions
from pipeline.reporting.page.template import render_page
from pipeline.reporting.terminal.neighbour_tables import price_lines
from pipeline.reporting.terminal.tables import METRIC_COLUMNS

MOST_COMPARED = 8
MOST_CLASSES = 40  # with more classes than this the confusion matrix would be unreadable and is left out
MOST_UNREADABLE = 200
FEWEST_MAPPED = 5
"""Headings of the metrics in the table of all results, besides accuracy; some only if the plan chooses by them."""
ALWAYS_SHOWN = ("mean_per_class_accuracy", "macro_f1", "auroc")


@dataclass(frozen=True)
class Seen:
    """A source's images, and the features that each head was fitted on, by the key of its result."""

    images: ImageSource
    features: dict[str, Features]

    @property
    def files(self) -> list[CacheFile]:
        """All cache files of these features."""
        return list(dict.fromkeys(file for features in self.features.values() for file in features.files.values()))


def render(folder: RunFolder, plan_text: str, seen: Mapping[str, Seen]) -> str:
    """Return the page of a run with at least one result; `seen` is by name of the source."""
    info = folder.read_info()
    extraction = extraction_seconds(info)
    found = leaderboards(folder.results.values())
    chapters = [
        _chapter(number, board, seen[board.source], folder, extraction) for number, board in enumerate(found, 1)
    ]
    ordered_by = next(iter(folder.results.values())).result.metric
    return render_page(
        "report",
        chapters=chapters,
        table=_table(chapters, extraction),
        metric_columns={name: METRIC_COLUMNS[name] for name in METRIC_COLUMNS if name in (*ALWAYS_SHOWN, ordered_by)},
        ordered_by=ordered_by,
        several=len(found) > 1,
        info=info,
        costs=[cost for cost in info.extractions.values() if cost.computed and cost.seconds],
        plan=plan_text,
        n_results=len(folder.results),
        percent=percent,
        duration=duration,
    )


def _chapter(
    number: int, board: Leaderboard, seen: Seen, folder: RunFolder, extraction: ExtractionTimes
) -> dict[str, Any]:
    """Return the page's part on one source."""
    album = Album(seen.images)
    verdict = answer(board, folder.predictions, extraction)
    classes = seen.images.classes
    chosen = [score for score in (verdict.frozen, verdict.tuned) if score is not None]
    predictions = {score.first.key: folder.predictions(score.first.key) for score in chosen}
    charts = [
        depth_chart(board, verdict.best_sets.get(board.shots[-1])),
        labels_chart(board),
        cost_chart(board, extraction),
    ]
    charts += [class_chart(chosen, predictions, classes), calibration_chart(chosen, predictions)]
    if verdict.frozen is not None:
        key, layer = verdict.frozen.first.key, verdict.frozen.method.layer
        if key in seen.features and len(predictions[key].uris) >= FEWEST_MAPPED:
            charts.append(map_chart(*lay_out_map(seen.features[key], layer, predictions[key]), classes, layer))
    unreadable = _unreadable(seen.files)
    return {
        "board": board,
        "source": board.source,
        "anchor": f"source-{number}",
        "answer": verdict,
        "charts": [chart for chart in charts if chart is not None],
        "differences": _differences(board, folder),
        "models": [_model(score, predictions[score.first.key], classes, album) for score in chosen],
        "leaks": leaks(seen.files[0], seen.images, album) if seen.files else None,
        "unreadable": unreadable[:MOST_UNREADABLE],
        "unreadable_count": len(unreadable),
    }


def _table(chapters: Sequence[dict[str, Any]], extraction: ExtractionTimes) -> list[dict[str, Any]]:
    """Return a row for each method and number of labels, the best on test by the plan's metric first."""
    scores = [
        (one["source"], score, one["answer"].best_sets) for one in chapters for score in one["board"].scores.values()
    ]
    scores.sort(key=lambda row: (shots_order(row[1].shots), row[1].score), reverse=True)
    rows = []
    for source, score, best_sets in scores:
        low, high = score.interval
        among = best_sets.get(score.shots)
        rows.append(
            {
                "source": source,
                "kind": "frozen" if score.method.is_frozen else "fine-tuned",
                "method": score.name,
                "shots": score.shots,
                "seeds": len(score.by_seed),
                "accuracy": score.accuracy,
                "interval": f"{100 * low:.1f}–{100 * high:.1f}",
                "best": "–" if among is None else "yes" if score.name in among.methods else "no",
                "metrics": {name: score.mean(name) for name in METRICS[1:]},
                "log_loss": _calibrated(score, "log_loss"),
                "ece": _calibrated(score, "ece"),
                "seconds": seconds(score, extraction),
                "converged": all(job.result.converged for job in score.by_seed.values()),
            }
        )
    return rows


def _calibrated(score: MethodScore, key: str) -> float | None:
    """Return a measure of the probabilities that `predict` gives, which are calibrated if that was possible."""
    calibrated = score.mean(f"{key}_calibrated")
    return score.mean(key) if calibrated is None else calibrated


def _differences(board: Leaderboard, folder: RunFolder) -> dict[str, Any] | None:
    """Return the leading methods, by how many points the row's is ahead of the column's, and if that is real.

    The intervals hold for all pairs together (Bonferroni's correction).
    """
    scores = [board.scores[method, board.shots[-1]] for method in contenders(board)][:MOST_COMPARED]
    scores.sort(key=lambda score: -score.accuracy)
    pairs = list(combinations(range(len(scores)), 2))
    confidence = 1 - LEVEL / max(1, len(pairs))
    tested = [compare_scores(scores[a], scores[b], folder.predictions, confidence=confidence) for a, b in pairs]
    if not any(tested):
        return None
    cells: list[list[tuple[str, str, bool] | None]] = [[None] * len(scores) for _ in scores]
    for (a, b), test in zip(pairs, tested, strict=True):
        if test is not None:
            for row, column, sign in ((a, b, 1), (b, a, -1)):
                low, high = sorted((sign * test.low, sign * test.high))
                interval = f"{points(low)} to {points(high)}"
                cells[row][column] = (points(sign * test.difference), interval, test.is_real)
    return {"names": [score.name for score in scores], "cells": cells}


def _model(score: MethodScore, predictions: Predictions, classes: Sequence[str], album: Album) -> dict[str, Any]:
    """Return one method in detail: its classes, the confusion matrix, the mistakes."""
    counts = count(predictions.y_true, predictions.y_pred, len(classes))
    rows = []
    for number, name in enumerate(classes):
        true, predicted, right = (int(column[number]) for column in counts)
        recall = right / true if true else 0.0
        shown = percent(recall) if true else "–"
        precision = percent(right / predicted) if predicted else "–"
        f1 = percent(2 * right / (true + predicted)) if true + predicted else "–"
        rows.append((name, true, shown, precision, f1, recall))
    rows.sort(key=lambda row: row[5])
    seed = f", seed {score.first.result.seed}" if len(score.by_seed) > 1 else ""
    drawn = len(classes) <= MOST_CLASSES
    return {
        "title": f"{score.name}{seed}",
        "rows": rows,
        "classes": classes,
        "counts": confusion_counts(predictions.y_true, predictions.y_pred, len(classes)).tolist() if drawn else [],
        "price": (price := score.first.result.leak_price),
        "price_lines": price_lines(price) if price else [],
        "confusions": worst_confusions(predictions, classes, album),
    }


def _unreadable(files: Sequence[CacheFile]) -> list[tuple[str, str]]:
    found: dict[str, str] = {}
    for file in files:
        for row in np.flatnonzero(file.states == UNREADABLE):
            found[str(file.uris[row])] = str(file.reasons[row])
    return sorted(found.items())
