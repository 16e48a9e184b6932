"""Which models differ by more than chance in a metric that is no share of rows; for one seed and over several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from pipeline.evaluation.bootstrap import compare_redrawn
from pipeline.evaluation.comparisons import best_validated
from pipeline.evaluation.metrics import mean_if_known
from pipeline.evaluation.multilabel import redraw_labels
from pipeline.evaluation.predictions import Predictions
from pipeline.evaluation.regression import redraw_numbers
from pipeline.results import MetricSummary, MultilabelResult, RegressionResult

R = TypeVar("R", RegressionResult, MultilabelResult)


def compare_metrics(results: Sequence[R], predictions: Sequence[Predictions]) -> list[R]:
    """Return the results with `p_vs_best` and `in_best_set`; those of the same test rows are compared."""
    alike: dict[bytes, list[int]] = {}
    for index, one in enumerate(predictions):
        alike.setdefault(one.uris.tobytes(), []).append(index)
    judged = list(results)
    for indices in alike.values():
        if len(indices) > 1:
            found = _Compared([[results[index]] for index in indices], [[predictions[index]] for index in indices])
            for index, p, best in zip(indices, found.p_values, found.may_be_best, strict=True):
                judged[index] = replace(results[index], p_vs_best=p, in_best_set=best)
    return judged


def summarise_metrics(results: Sequence[R], predictions: Sequence[Predictions]) -> list[MetricSummary]:
    """Summarise each layer and head over seeds, in order; return nothing for a single seed.

    Heads are compared if their test rows are the same for each seed. A row that several seeds test is drawn for all of
    them together.
    """
    cells: dict[tuple[str, str], list[int]] = {}
    for index, result in enumerate(results):
        cells.setdefault((result.layer, result.head), []).append(index)
    if len(results) == len(cells):
        return []
    members = [[results[index] for index in indices] for indices in cells.values()]
    said = [[predictions[index] for index in indices] for indices in cells.values()]
    tests = {tuple(one.uris.tobytes() for one in of_head) for of_head in said}
    together = _Compared(members, said) if len(tests) == 1 else None
    summaries = []
    for number, (own, told) in enumerate(zip(members, said, strict=True)):
        alone = together or _Compared([own], [told])
        position = number if together else 0
        values = np.array([_value(one) for one in own])
        summaries.append(
            MetricSummary(
                backbone=own[0].backbone,
                layer=own[0].layer,
                pool=own[0].pool,
                head=own[0].head,
                shots=own[0].shots,
                metric=own[0].metric,
                seeds=len(own),
                mean=float(values.mean()),
                ci95=alone.interval(position),
                sd=float(values.std(ddof=1)),
                lowest=float(values.min()),
                highest=float(values.max()),
                p_vs_best=alone.p_values[position],
                in_best_set=alone.may_be_best[position] if together and len(cells) > 1 else None,
                shared_test=len({one.uris.tobytes() for one in told}) == 1 and own[0].cv is None,
            )
        )
    return summaries


def _value(result: RegressionResult | MultilabelResult) -> float:
    value: float | None = getattr(result, result.metric)
    return math.nan if value is None else value


class _Compared:
    """Models, each trained with one or several seeds, on the same test rows of each seed."""

    def __init__(self, models: Sequence[Sequence[R]], predictions: Sequence[Sequence[Predictions]]) -> None:
        redraw = redraw_numbers if isinstance(models[0][0], RegressionResult) else redraw_labels
        metric = models[0][0].metric
        self.redrawn = [redraw(metric, own) for own in predictions]
        validated = [(mean_if_known([one.validated for one in own]), None) for own in models]
        compared = compare_redrawn(self.redrawn, best_validated(validated))
        self.p_values: list[float | None] = [None] * len(models)
        self.may_be_best: list[bool | None] = [None] * len(models)
        if compared is not None:
            self.p_values, self.may_be_best = compared[0], compared[1].tolist()

    def interval(self, position: int) -> tuple[float, float] | None:
        """Return the interval of the mean over seeds."""
        return self.redrawn[position].interval()
