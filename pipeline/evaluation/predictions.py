"""What models predicted on their test rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.arrays import BoolArray, Float64Array, FloatArray, IntArray, StrArray
from pipeline.evaluation.calibration import tempered
from pipeline.evaluation.intervals import accuracy_interval, effective_rows, number_clusters
from pipeline.evaluation.metrics import evaluate, expected_calibration_error, log_loss
from pipeline.evaluation.rows import Table
from pipeline.options import CLASSIFICATION


@dataclass(frozen=True, eq=False)
class Predictions:
    """What one model, or the models of a cross-validation, predicted on each test row.

    A run folder keeps the first four columns and the groups; of labels and numbers also scores and folds.

    Parameters
    ----------
    uris : (n,) str
        Names of the images.
    y_true, y_pred : (n,) int64, (n, K) bool or (n,) float64
        Class numbers, labels or numbers.
    probability : (n,) float or None
        Probability of `y_pred`, calibrated if possible; None for heads without probabilities.
    probabilities : (n, K) float64, optional
        Of all classes, as the head gives them.
    temperatures : (n,) float64, optional
        Calibrate the probabilities of each row, see `pipeline.evaluation.calibration`.
    folds : (n,) int64, optional
        The fold of each row in a cross-validation.
    scores : (n, K) float64, optional
        Of all classes, for heads without probabilities; larger where likelier.
    groups : (n,) str, optional
        The group of each row, ``""`` for none; None in run folders that do not have them yet.
    """

    uris: StrArray
    y_true: NDArray[Any]
    y_pred: NDArray[Any]
    probability: FloatArray | None
    probabilities: Float64Array | None = None
    temperatures: Float64Array | None = None
    folds: IntArray | None = None
    groups: StrArray | None = None
    scores: Float64Array | None = None

    @property
    def units(self) -> StrArray:
        """What each row belongs to (n,): its group, or the image alone. Rows of one unit are alike."""
        alone = np.char.add("image ", self.uris)
        return alone if self.groups is None else np.where(self.groups == "", alone, np.char.add("group ", self.groups))

    @property
    def right(self) -> BoolArray:
        """Whether each row was predicted right (n,)."""
        return np.asarray(self.y_pred == self.y_true)

    @property
    def calibrated(self) -> Float64Array | None:
        """Probabilities (n, K) after calibration; None without probabilities or temperatures."""
        if self.probabilities is None or self.temperatures is None:
            return None
        return tempered(self.probabilities, self.temperatures[:, None])

    def take(self, rows: IntArray) -> Predictions:
        """Return the predictions on some of the rows."""
        columns = {one.name: getattr(self, one.name) for one in fields(self)}
        taken: dict[str, Any] = {name: None if column is None else column[rows] for name, column in columns.items()}
        return Predictions(**taken)

    def accuracies(self) -> Float64Array:
        """Return the accuracy on each fold (k,), a single one without cross-validation."""
        folds = np.zeros(len(self.right), np.int64) if self.folds is None else self.folds
        return np.asarray(np.bincount(folds, weights=self.right) / np.bincount(folds))


def collect_predictions(
    table: Table,
    tests: Sequence[IntArray],
    y_pred: Sequence[NDArray[Any]],
    probabilities: Sequence[Float64Array | None],
    temperatures: Sequence[float | None],
    scores: Sequence[Float64Array | None] = (),
) -> Predictions:
    """Put the predictions of all folds together, in the order of the rows in the table.

    Parameters
    ----------
    table : Table
    tests : sequence of (m,) int64
        Row numbers of each fold's test rows; a single array without cross-validation.
    y_pred, probabilities, temperatures, scores : sequences
        For each fold what is predicted (m, ...), the probabilities (m, K) of all classes, what calibrates these, and
        the scores (m, K) where there are no probabilities.
    """
    rows = np.concatenate(tests)
    order = np.argsort(rows)
    rows, labels = rows[order], np.concatenate(y_pred)[order]
    sizes = [len(test) for test in tests]
    given = [one for one in probabilities if one is not None]
    of_all = np.concatenate(given)[order] if given else None
    calibrated_folds = any(one is not None for one in temperatures)
    told = [1.0 if one is None else one for one in temperatures]  # a fold without one
    of_rows = np.repeat(told, sizes)[order] if calibrated_folds else None
    folds = np.repeat(np.arange(len(tests)), sizes)[order] if len(tests) > 1 else None
    known = [one for one in scores if one is not None]
    ranked = np.concatenate(known)[order] if len(known) == len(tests) else None
    clusters = table.clusters[rows]
    columns = (table.uris[rows], table.y[rows], labels, None, of_all, of_rows, folds, clusters, ranked)
    found = Predictions(*columns)
    if table.task != CLASSIFICATION:
        return found
    calibrated = found.calibrated
    sure = of_all if calibrated is None else calibrated
    return found if sure is None else replace(found, probability=sure[np.arange(len(labels)), labels])


def measure(predictions: Predictions, n_classes: int) -> dict[str, Any]:
    """Return the keys of a `FitResult` that measure predictions over `n_classes`."""
    calibrated, temperatures = predictions.calibrated, predictions.temperatures
    y_true, right, clusters = predictions.y_true, predictions.right, number_clusters(predictions.units)
    n_effective = effective_rows(right.astype(np.float64), clusters)
    return {
        **count_rows(predictions),
        "n_effective": n_effective,
        "accuracy_ci95": accuracy_interval(float(right.mean()), len(right), n_effective),
        **asdict(
            evaluate(
                y_true,
                predictions.y_pred,
                n_classes,
                predictions.probabilities,
                predictions.scores,
                predictions.folds,
            )
        ),
        "temperature": None if temperatures is None else float(np.median(temperatures)),
        "log_loss_calibrated": None if calibrated is None else log_loss(y_true, calibrated),
        "ece_calibrated": None if calibrated is None else expected_calibration_error(y_true, calibrated),
    }


def count_rows(predictions: Predictions) -> dict[str, int]:
    """Return the number of test rows and that of their groups; a row without a group counts as one."""
    return {"n_test": len(predictions.uris), "n_groups": len(np.unique(predictions.units))}
