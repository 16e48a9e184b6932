"""The report of a comparison: one HTML page that loads nothing from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np

from features_cache import UNREADABLE, CacheFile
from pipeline.comparing.answer import Answer, ExtractionTimes, duration, extraction_seconds, seconds
from pipeline.comparing.features import Features
from pipeline.comparing.folder import RunFolder
from pipeline.comparing.methods import Leaderboard, MethodScore, leaderboards, shots_order
from pipeline.comparing.paired import LEVEL, ReadPredictions, compare_scores
from pipeline.evaluation.predictions import Predictions
from pipeline.evaluation.wording import ACCURACY, METRIC_TITLES, metric_text, percent
from pipeline.images.sources.registry import ImageSource
from pipeline.options import CLASSIFICATION, METRICS_OF, MULTILABEL
from pipeline.reporting.page.details import details
from pipeline.reporting.page.method_charts import Chart, contenders, cost_chart, depth_chart, labels_chart
from pipeline.reporting.page.model_charts import (
    calibration_chart,
    class_chart,
    map_chart,
    number_chart,
    precision_chart,
)
from pipeline.reporting.page.pictures import Album, lay_out_map, leaks
from pipeline.reporting.page.template import render_page
from pipeline.results import LOWER_IS_BETTER

MOST_COMPARED = 8
MOST_UNREADABLE = 200
FEWEST_MAPPED = 5
ALWAYS_SHOWN = ("mean_per_class_accuracy", "macro_f1", "auroc")
"""Metrics of classes in the table of all results, besides accuracy; others only if the plan chooses by them."""


@dataclass(frozen=True)
class Seen:
    """A source's images, and the features that each head was fitted on, by the key of its result."""

    images: ImageSource
    features: dict[str, Features]

    @property
    def files(self) -> list[CacheFile]:
        """All cache files of these features."""
        return list(dict.fromkeys(file for features in self.features.values() for file in features.files.values()))


def render(folder: RunFolder, plan_text: str, seen: Mapping[str, Seen], answers: Sequence[Answer]) -> str:
    """Return the page of a run with at least one result.

    `seen` is by name of the source, and `answers` are in the order of `leaderboards`.
    """
    info = folder.read_info()
    extraction = extraction_seconds(info)
    found = leaderboards(folder.results.values())
    chapters = [
        _chapter(number, board, verdict, seen[board.source], folder, extraction)
        for number, (board, verdict) in enumerate(zip(found, answers, strict=True), 1)
    ]
    first = next(iter(folder.results.values()))
    ordered_by, measure = first.result.metric, next(iter(found[0].scores.values())).measure
    shown = {*METRICS_OF[first.task]} if first.task != CLASSIFICATION else {*ALWAYS_SHOWN, ordered_by}
    shown |= {"auroc"} if first.task == MULTILABEL else set()
    return render_page(
        "report",
        chapters=chapters,
        table=_table(chapters, extraction),
        measure=measure,
        of_classes=first.task == CLASSIFICATION,
        metric_columns={
            name: title for name, title in METRIC_TITLES.items() if name in shown and name != measure.metric
        },
        lower_is_better=LOWER_IS_BETTER,
        ordered_by=ordered_by,
        several=len(found) > 1,
        info=info,
        costs=[cost for cost in info.extractions.values() if cost.computed and cost.seconds],
        plan=plan_text,
        n_results=len(folder.results),
        percent=percent,
        metric_text=metric_text,
        duration=duration,
    )


def _chapter(
    number: int, board: Leaderboard, verdict: Answer, seen: Seen, folder: RunFolder, extraction: ExtractionTimes
) -> dict[str, Any]:
    """Return the page's part on one source."""
    album, read = Album(seen.images), cache(folder.predictions)
    classes = seen.images.classes
    chosen = [score for score in (verdict.frozen, verdict.tuned) if score is not None]
    predictions = {score.first.key: read(score.first.key) for score in chosen}
    charts = [
        depth_chart(board, verdict.best_sets.get(board.shots[-1])),
        labels_chart(board),
        cost_chart(board, extraction),
        *_model_charts(chosen, predictions, seen),
    ]
    unreadable = _unreadable(seen.files)
    return {
        "board": board,
        "source": board.source,
        "anchor": f"source-{number}",
        "answer": verdict,
        "charts": [chart for chart in charts if chart is not None],
        "differences": _differences(board, read),
        "models": [details(score, predictions[score.first.key], classes, album) for score in chosen],
        "leaks": leaks(seen.files[0], seen.images, album) if seen.files else None,
        "unreadable": unreadable[:MOST_UNREADABLE],
        "unreadable_count": len(unreadable),
    }


def _model_charts(
    chosen: Sequence[MethodScore], predictions: Mapping[str, Predictions], seen: Seen
) -> list[Chart | None]:
    """Return the charts of the best head and the best fine-tuning, which suit what they predict."""
    classes, frozen = seen.images.classes, [score for score in chosen if score.method.is_frozen]
    if chosen[0].task != CLASSIFICATION:
        return [precision_chart(chosen) if chosen[0].task == MULTILABEL else number_chart(chosen, predictions)]
    charts = [class_chart(chosen, predictions, classes), calibration_chart(chosen, predictions)]
    for score in frozen:
        said, layer = predictions[score.first.key], score.method.layer
        if score.first.key in seen.features and len(said.uris) >= FEWEST_MAPPED:
            charts.append(map_chart(*lay_out_map(seen.features[score.first.key], layer, said), classes, layer))
    return charts


def _table(chapters: Sequence[dict[str, Any]], extraction: ExtractionTimes) -> list[dict[str, Any]]:
    """Return a row for each method and number of labels, the best on test by the plan's metric first.

    `share` is drawn as a bar, where the measure is a share.
    """
    scores = [
        (one["source"], score, one["answer"].best_sets) for one in chapters for score in one["board"].scores.values()
    ]
    scores.sort(key=lambda row: (shots_order(row[1].shots), -row[1].rank), reverse=True)
    rows = []
    for source, score, best_sets in scores:
        among, measure = best_sets.get(score.shots), score.measure
        rows.append(
            {
                "source": source,
                "kind": "frozen" if score.method.is_frozen else "fine-tuned",
                "method": score.name,
                "shots": score.shots,
                "seeds": len(score.by_seed),
                "value": None if math.isnan(score.value) else score.value,
                "shown": measure.text(score.value),
                "share": score.value if measure.metric == ACCURACY else None,
                "lower_end": score.interval[0] if score.interval else None,
                "interval": measure.interval_text(score.interval).removesuffix(" %"),
                "best": "–" if among is None else "yes" if score.name in among.methods else "no",
                "metrics": {name: score.mean(name) for name in METRIC_TITLES},
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


def _differences(board: Leaderboard, read: ReadPredictions) -> dict[str, Any] | None:
    """Return the leading methods, by how much the row's is ahead of the column's, and if that is real.

    The intervals hold for all pairs together (Bonferroni's correction). A method that was chosen from several on the
    test images counts as compared in place of each of these.
    """
    chosen_from = contenders(board)
    scores = [board.scores[method, board.shots[-1]] for method in chosen_from][:MOST_COMPARED]
    scores.sort(key=lambda score: (math.isnan(score.value), -score.measure.sign * score.value))
    pairs = list(combinations(range(len(scores)), 2))
    tested = []
    for a, b in pairs:
        n_compared = len(pairs) * chosen_from[scores[a].method] * chosen_from[scores[b].method]
        tested.append(compare_scores(scores[a], scores[b], read, confidence=1 - LEVEL / n_compared))
    if not any(tested):
        return None
    cells: list[list[tuple[str, str, bool] | None]] = [[None] * len(scores) for _ in scores]
    for (a, b), test in zip(pairs, tested, strict=True):
        if test is not None:
            text = test.measure.difference_text
            for row, column, sign in ((a, b, 1), (b, a, -1)):
                low, high = sorted((sign * test.low, sign * test.high))
                cells[row][column] = (text(sign * test.difference), f"{text(low)} to {text(high)}", test.is_real)
    return {"names": [score.name for score in scores], "cells": cells}


def _unreadable(files: Sequence[CacheFile]) -> list[tuple[str, str]]:
    found: dict[str, str] = {}
    for file in files:
        for row in np.flatnonzero(file.states == UNREADABLE):
            found[str(file.uris[row])] = str(file.reasons[row])
    return sorted(found.items())
