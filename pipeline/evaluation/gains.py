"""What joined columns add to features: the same head without them and with them, on the same rows, splits and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.evaluation.bootstrap import lead
from pipeline.evaluation.intervals import number_clusters, paired_interval
from pipeline.evaluation.multilabel import redraw_labels
from pipeline.evaluation.predictions import Predictions
from pipeline.evaluation.regression import redraw_numbers
from pipeline.evaluation.rows import Layer
from pipeline.evaluation.seeds import pool_seeds
from pipeline.options import CLASSIFICATION, REGRESSION
from pipeline.results import LOWER_IS_BETTER, ColumnsGain


def columns_gains(
    layers: Sequence[Layer], results: Sequence[Any], predictions: Sequence[Predictions]
) -> list[ColumnsGain]:
    """Compare each head on joined columns with the same head without them, over all seeds; nothing without columns.

    Parameters
    ----------
    layers : sequence of Layer
        That of each result.
    results : sequence of FitResult, RegressionResult or MultilabelResult
    predictions : sequence of Predictions
        One for each result.
    """
    cells: dict[tuple[str, bool, str, int | str], list[int]] = {}
    for index, (layer, result) in enumerate(zip(layers, results, strict=True)):
        cells.setdefault((layer.unjoined, layer.joined is not None, result.head, result.shots), []).append(index)
    found = []
    for (unjoined, is_joined, head, shots), indices in cells.items():
        if not is_joined:
            continue
        both = [[predictions[index] for index in own] for own in (cells[unjoined, False, head, shots], indices)]
        one = results[indices[0]]
        metric = "accuracy" if layers[indices[0]].table.task == CLASSIFICATION else one.metric
        values, interval = _compared(both, metric, layers[indices[0]].table.task)
        found.append(
            ColumnsGain(
                backbone=one.backbone,
                layer=unjoined,
                pool=one.pool,
                columns=one.columns,
                head=head,
                shots=shots,
                metric=metric,
                seeds=len(indices),
                value_without=values[0],
                value_with=values[1],
                gain=(values[0] - values[1]) if metric in LOWER_IS_BETTER else (values[1] - values[0]),
                gain_ci95=interval,
            )
        )
    return found


def _compared(
    both: Sequence[Sequence[Predictions]], metric: str, task: str
) -> tuple[list[float], tuple[float, float] | None]:
    """Return a metric of two heads, each a mean over seeds, and an interval of how much better the second is."""
    if task == CLASSIFICATION:
        (without, units), (joined, _) = (pool_seeds(of_head) for of_head in both)
        return [float(without.mean()), float(joined.mean())], paired_interval(joined, without, number_clusters(units))
    redraw = redraw_numbers if task == REGRESSION else redraw_labels
    first, second = (redraw(metric, of_head) for of_head in both)
    ahead = lead(second, first)
    return [first.value, second.value], None if ahead is None else (ahead.low, ahead.high)
