"""What trained heads said about their test rows, fold by fold, and how that varies over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.arrays import Float64Array
from pipeline.evaluation.calibration import tempered
from pipeline.evaluation.comparisons import compare_over_splits
from pipeline.evaluation.intervals import wilson
from pipeline.evaluation.metrics import evaluate, expected_calibration_error, log_loss
from pipeline.heads.grid import Cut
from pipeline.heads.trial import Outcome
from pipeline.results import FitResult, SeedSummary


@dataclass(frozen=True, eq=False)
class TestPredictions:
    """What one model, or the models of a cross-validation, said about each test row.

    Parameters
    ----------
    uris, groups : (n,) str
        Names of the images, and of the groups they belong to; ``""`` is no group.
    folds : (n,) int64
        Which fold a row is of; 0 without cross-validation.
    y_true, y_pred : (n,) int64
        Class numbers.
    probabilities : (n, K) float64 or None
        Of all classes, a line each row, as the head gives them; ``None`` for heads without probabilities.
    temperatures : (n,) float64 or None
        What calibrates them, see `pipeline.evaluation.calibration`.
    """

    uris: NDArray[np.str_]
    groups: NDArray[np.str_]
    folds: NDArray[np.int64]
    y_true: NDArray[np.int64]
    y_pred: NDArray[np.int64]
    probabilities: Float64Array | None
    temperatures: Float64Array | None

    @property
    def right(self) -> NDArray[np.bool_]:
        """Which rows were predicted right (n,)."""
        return np.asarray(self.y_pred == self.y_true)

    @property
    def calibrated(self) -> Float64Array | None:
        """Probabilities (n, K) after calibration, ``None`` where there is none."""
        if self.probabilities is None or self.temperatures is None:
            return None
        return tempered(self.probabilities, self.temperatures[:, None])

    @property
    def probability(self) -> Float64Array | None:
        """That of `y_pred` (n,), calibrated where it can be: what `predict` tells."""
        probabilities = self.probabilities if self.temperatures is None else self.calibrated
        return None if probabilities is None else np.asarray(probabilities[np.arange(len(self.y_pred)), self.y_pred])

    def accuracies(self) -> Float64Array:
        """Return the accuracy on each fold (k,)."""
        return np.asarray(np.bincount(self.folds, weights=self.right) / np.bincount(self.folds))


def scores(said: TestPredictions, n_classes: int) -> dict[str, Any]:
    """Return the keys of a `FitResult` that measure predictions over `n_classes`."""
    calibrated = said.calibrated
    return {
        "n_test": len(said.y_true),
        "accuracy_ci95": wilson(int(said.right.sum()), len(said.right)),
        **asdict(evaluate(said.y_true, said.y_pred, n_classes, said.probabilities)),
        "temperature": None if said.temperatures is None else float(np.median(said.temperatures)),
        "log_loss_calibrated": None if calibrated is None else log_loss(said.y_true, calibrated),
        "ece_calibrated": None if calibrated is None else expected_calibration_error(said.y_true, calibrated),
    }


def pool_folds(cell: Sequence[tuple[Cut, Outcome]]) -> TestPredictions:
    """Put the test rows of all folds into their order in the table."""
    tests = [cut.splits.test for cut, _ in cell]
    rows = np.concatenate(tests)
    order = np.argsort(rows)
    table = cell[0][0].layer.table
    parts = [outcome.probabilities for _, outcome in cell if outcome.probabilities is not None]
    temperatures = [
        np.full(len(test), outcome.choice.temperature)
        for test, (_, outcome) in zip(tests, cell, strict=True)
        if outcome.choice.temperature is not None
    ]
    return TestPredictions(
        table.uris[rows[order]],
        table.groups[rows[order]],
        np.repeat(np.arange(len(tests)), [len(test) for test in tests])[order],
        table.labels[rows[order]],
        np.concatenate([outcome.y_pred for _, outcome in cell])[order],
        np.concatenate(parts)[order] if parts else None,
        np.concatenate(temperatures)[order] if len(temperatures) == len(cell) else None,
    )


def summarise(results: Sequence[FitResult], predictions: Sequence[TestPredictions]) -> list[SeedSummary]:
    """Sum up seeds, where there are several, and compare what resampled splits allow to compare.

    Parameters
    ----------
    results : sequence of FitResult
        All of one call.
    predictions : sequence of TestPredictions
        One for each.

    Returns
    -------
    list of SeedSummary
        One for each layer, head and number of shots, in the order of the results.
    """
    cells: dict[tuple[str, str, int | str], list[int]] = {}
    for place, result in enumerate(results):
        cells.setdefault((result.layer, result.head, result.shots), []).append(place)
    if len(results) == len(cells):
        return []
    found = {cell: _over_seeds([results[place] for place in places]) for cell, places in cells.items()}
    for shots in dict.fromkeys(result.shots for result in results):
        rivals = [cell for cell in cells if cell[2] == shots]
        tests = {tuple(predictions[place].uris.tobytes() for place in cells[cell]) for cell in rivals}
        places = cells[rivals[0]]
        resampled = len(set(next(iter(tests)))) > 1 or results[places[0]].cv is not None
        if len(tests) > 1 or not resampled:
            continue  # the test is for heads on the same splits, whose test rows vary from seed to seed
        splits = [np.concatenate([predictions[place].accuracies() for place in cells[cell]]) for cell in rivals]
        one = results[places[0]]
        p_values = compare_over_splits(splits, one.n_pool, one.n_test // (one.cv or 1))
        for cell, p in zip(rivals, p_values, strict=True):
            found[cell] = replace(found[cell], p_vs_best=p)
    return list(found.values())


def _over_seeds(results: Sequence[FitResult]) -> SeedSummary:
    accuracies = np.array([result.accuracy for result in results])
    one, mean = results[0], float(accuracies.mean())
    return SeedSummary(
        one.backbone,
        one.layer,
        one.pool,
        one.head,
        one.shots,
        len(results),
        mean,
        wilson(round(mean * one.n_test), one.n_test),
        float(accuracies.std(ddof=1)),
        float(accuracies.min()),
        float(accuracies.max()),
        None,
    )
