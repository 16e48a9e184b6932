"""Which results differ by more than chance: paired tests between models, corrected for how many are made."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.arrays import BoolArray, Float64Array
from pipeline.evaluation.intervals import FEWEST_SPLITS, corrected_t_test, mcnemar


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number so that all claims hold together (Holm 1979)."""
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(factors * np.asarray(p_values, np.float64)[order]), 1)
    return [float(p) for p in adjusted]


def compare_models(tests: Sequence[NDArray[np.str_]], right: Sequence[BoolArray]) -> list[float | None]:
    """Compare each model with the most accurate one on the same test rows: McNemar's exact test, Holm's correction.

    Parameters
    ----------
    tests : sequence of (n,) str
        Names of each model's test rows; models are compared where these are the same in the same order.
    right : sequence of (n,) bool
        Which of them it predicted right.

    Returns
    -------
    list of float or None
        A p-value for each model; ``None`` for the most accurate (the first on a tie) and where nothing shares its rows.
    """
    alike: dict[bytes, list[int]] = {}
    for place, names in enumerate(tests):
        alike.setdefault(names.tobytes(), []).append(place)
    compared: list[float | None] = [None] * len(right)
    for places in alike.values():
        best = max(places, key=lambda place: int(right[place].sum()))
        others = [place for place in places if place != best]
        adjusted = holm([mcnemar(right[best], right[place]) for place in others])
        for place, p in zip(others, adjusted, strict=True):
            compared[place] = p
    return compared


def tell_ties(p_values: Sequence[float | None], level: float = 0.05) -> list[str]:
    """Say how many of the compared models may be as good as the most accurate one on their test rows."""
    compared = [p for p in p_values if p is not None]
    ties = sum(p >= level for p in compared)
    if not compared:
        return []
    told = f"{ties} of {len(compared)} other results are not distinguishable from the best on the same test images"
    return [f"{told} (McNemar's exact test, Holm's correction, {100 * level:g} %)"]


def compare_over_splits(accuracies: Sequence[Float64Array], n_train: int, n_test: int) -> list[float | None]:
    """Compare each head with the one of best mean over the same resampled splits, by the corrected t-test and Holm's.

    Parameters
    ----------
    accuracies : sequence of (k,) float64
        Of each head on each split.
    n_train, n_test : int
        As for `pipeline.evaluation.intervals.corrected_t_test`.

    Returns
    -------
    list of float or None
        A p-value for each head; ``None`` for the best, for one that trails it alike on every split, and for all where
        there are fewer than `FEWEST_SPLITS`.
    """
    best = int(np.argmax([values.mean() for values in accuracies]))
    compared: list[float | None] = [None] * len(accuracies)
    if len(accuracies[best]) < FEWEST_SPLITS:
        return compared
    tested = [corrected_t_test(accuracies[best] - values, n_train, n_test)[1] for values in accuracies]
    judged = [place for place, p in enumerate(tested) if place != best and not np.isnan(p)]
    for place, p in zip(judged, holm([tested[place] for place in judged]), strict=True):
        compared[place] = p
    return compared
