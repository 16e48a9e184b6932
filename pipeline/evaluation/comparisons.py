"""Which results differ by more than chance: paired tests, corrected for their number; and which model to prefer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.arrays import BoolArray, Float64Array
from pipeline.evaluation.intervals import FEWEST_SPLITS, corrected_t_test, mcnemar


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for multiple tests (Holm 1979): the chance of any false claim then stays at the level.

    SciPy offers only `false_discovery_control`, which bounds the share of false claims.

    Examples
    --------
    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
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
        Names of each model's test rows; models are compared if these are the same in the same order.
    right : sequence of (n,) bool
        Whether each of them was predicted right.

    Returns
    -------
    list of float or None
        A p-value for each model; None for the most accurate one (ties go to the first), and for a model that shares its
        test rows with no other.

    Examples
    --------
    >>> rows = np.array([f"{i}.png" for i in range(8)])
    >>> good, bad = np.ones(8, bool), np.zeros(8, bool)
    >>> compare_models([rows, rows], [good, bad])
    [None, 0.0078125]
    """
    alike: dict[bytes, list[int]] = {}
    for index, names in enumerate(tests):
        alike.setdefault(names.tobytes(), []).append(index)
    compared: list[float | None] = [None] * len(right)
    for indices in alike.values():
        best = max(indices, key=lambda index: int(right[index].sum()))
        others = [index for index in indices if index != best]
        adjusted = holm([mcnemar(right[best], right[index]) for index in others])
        for index, p in zip(others, adjusted, strict=True):
            compared[index] = p
    return compared


def tie_notes(p_values: Sequence[float | None], level: float = 0.05) -> list[str]:
    """Return a note on how many of the compared models may be as good as the most accurate one on their test rows."""
    compared = [p for p in p_values if p is not None]
    ties = sum(p >= level for p in compared)
    if not compared:
        return []
    note = f"{ties} of {len(compared)} other results are not distinguishable from the best on the same test images"
    return [f"{note} (McNemar's exact test, Holm's correction, {100 * level:g} %)"]


def compare_over_splits(accuracies: Sequence[Float64Array], n_train: int, n_test: int) -> list[float | None]:
    """Compare each head with the one of best mean over the same resampled splits, by corrected t-test and Holm's rule.

    Parameters
    ----------
    accuracies : sequence of (k,) float64
        Accuracies of each head on each split.
    n_train, n_test : int
        As for `pipeline.evaluation.intervals.corrected_t_test`.

    Returns
    -------
    list of float or None
        A p-value for each head; None for the best, for a head whose distance to it is the same on every split, and for
        all if there are fewer than `FEWEST_SPLITS`.
    """
    best = int(np.argmax([values.mean() for values in accuracies]))
    compared: list[float | None] = [None] * len(accuracies)
    if len(accuracies[best]) < FEWEST_SPLITS:
        return compared
    tested = [corrected_t_test(accuracies[best] - values, n_train, n_test)[1] for values in accuracies]
    others = [index for index, p in enumerate(tested) if index != best and not np.isnan(p)]
    for index, p in zip(others, holm([tested[index] for index in others]), strict=True):
        compared[index] = p
    return compared


def preference(
    shots: int | str, score: float | None, index: int, log_loss: float | None = None
) -> tuple[float, float, float, int]:
    """Return a sort key of models whose largest is the one to keep: most shots, best validated, first in order.

    With few shots there are few validation rows, on which a model may be right by chance. So scores are compared only
    between models of the same number of shots. Ties go to the lower log-loss, because many models get all of a few or
    easy validation rows right.

    Parameters
    ----------
    shots : int or "all"
    score : float or None
        Validation accuracy; None or NaN, if nothing was validated, comes last.
    index : int
        Position among the models.
    log_loss : float, optional
        On the validation rows; None or NaN, as without probabilities, comes last.

    Examples
    --------
    >>> models = [(5, 1.0, 0.1), ("all", 0.8, 0.5), ("all", 0.9, 0.4), ("all", 0.9, 0.3)]
    >>> max(models, key=lambda one: preference(*one[:2], 0, one[2]))
    ('all', 0.9, 0.3)
    """
    accuracy = -1.0 if score is None or math.isnan(score) else score
    loss = math.inf if log_loss is None or math.isnan(log_loss) else log_loss
    return math.inf if shots == "all" else float(shots), accuracy, -loss, -index
