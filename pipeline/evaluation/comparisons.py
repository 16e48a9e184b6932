"""Which models differ by more than chance: tests against the one chosen on validation, and those that may be the best.

No claim here rests on which model happened to be the best on test: its accuracy is too high, and so are its leads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.arrays import BoolArray, Float64Array, IntArray
from pipeline.evaluation.intervals import CONFIDENCE, corrected_t_test, mcnemar, number_clusters
from pipeline.evaluation.predictions import Predictions
from pipeline.results import FitResult

R = TypeVar("R", bound=FitResult)

_DRAWS = 1999  # with the observed one 2000, of which 5 % are a whole number
_CHUNK = 1 << 22  # signs held at once
_SAME = 1e-9  # statistics that differ by less are equal but for rounding


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


def may_be_best(right: BoolArray, groups: NDArray[np.generic] | None = None, level: float = CONFIDENCE) -> BoolArray:
    """Tell which of several models may be the most accurate one, as far as these test rows can tell.

    With a probability of at least `level`, all models that are truly the best are among them; so where all are equally
    good, the chance that any is left out is at most ``1 - level``. For each pair, the difference is divided by its
    standard error; a model is left out if some rival's lead over it is larger than the largest of all leads is by
    chance. Chance is simulated by flipping the signs of all differences in a row, or in a group, together: thus models
    that err on the same rows are told apart by small leads. What is left is tested again without those that are out
    (Romano and Wolf 2005).

    Parameters
    ----------
    right : (methods, rows) bool
        Whether each model predicted each row right.
    groups : (rows,) array, optional
        Names or numbers; rows of one group are alike. By default every row stands for itself.
    level : float, default 0.95

    Returns
    -------
    (methods,) bool
        Never all False: the most accurate model on these rows is always among them.

    Examples
    --------
    >>> rows = np.arange(100)
    >>> may_be_best(np.array([rows < 90, rows < 89, rows < 70]))
    array([ True,  True, False])
    """
    clusters = None if groups is None else number_clusters(np.asarray(groups))
    return step_down(*_leads(_totals(np.asarray(right, bool), clusters)), level)


def step_down(leads: Float64Array, largest: Float64Array, level: float) -> BoolArray:
    """Return which of k models no rival leads by more than chance, the others left out first (Romano and Wolf 2005).

    Parameters
    ----------
    leads : (k,) float64
        Of the rival that leads each model most.
    largest : (draws, k) float64
        The same by chance.
    level : float
        Probability that all of equally good models are kept.
    """
    allowed = math.floor((1 - level) * (len(largest) + 1) + _SAME)  # draws that may be beyond, with the observed one
    best = np.ones(len(leads), bool)
    while allowed:
        bound = np.sort(largest[:, best].max(axis=1))[-allowed]
        left_out = best & (leads > bound + _SAME)
        if not left_out.any():
            break
        best &= ~left_out
    return best


def _totals(right: BoolArray, clusters: IntArray | None) -> Float64Array:
    """Return the number of right rows of each model in each cluster, without the clusters in which all are equal."""
    totals = right.astype(np.float64)
    if clusters is not None:
        totals = np.array([np.bincount(clusters, weights=row) for row in totals])
    return np.asarray(totals[:, (totals != totals[0]).any(axis=0)])


def _leads(totals: Float64Array) -> tuple[Float64Array, Float64Array]:
    """Return each model's largest studentised lead of a rival, (k,) as observed and (draws, k) by chance."""
    squares = totals @ totals.T
    norms = np.diag(squares)
    errors = np.sqrt(np.maximum(norms[:, None] + norms - 2 * squares, 0))
    errors[errors == 0] = 1  # the two are the same, and their difference is 0
    rng = np.random.default_rng(0)
    step = max(1, _CHUNK // max(1, totals.shape[1]))
    sizes = [min(step, _DRAWS - start) for start in range(0, _DRAWS, step)]
    signs = (rng.integers(0, 2, (size, totals.shape[1]), np.int8) * 2.0 - 1 for size in sizes)
    sums = np.concatenate([totals.sum(axis=1)[None], *(drawn @ totals.T for drawn in signs)])
    found = np.stack([((sums - sums[:, [one]]) / errors[one]).max(axis=1) for one in range(len(totals))], axis=1)
    return found[0], found[1:]


def compare_results(results: Sequence[R], predictions: Sequence[Predictions]) -> list[R]:
    """Return the results with `p_vs_best` and `in_best_set`, see `pipeline.results.FitResult`.

    Results of the same test rows and shots are compared with each other, and with no others.
    """
    alike: dict[tuple[bytes, int | str], list[int]] = {}
    for index, (result, found) in enumerate(zip(results, predictions, strict=True)):
        alike.setdefault((found.uris.tobytes(), result.shots), []).append(index)
    judged = list(results)
    for indices in alike.values():
        validated = [(results[index].validated, results[index].validation_log_loss) for index in indices]
        right, units = np.array([predictions[index].right for index in indices]), predictions[indices[0]].units
        p_values = compare_with_chosen(right, units, best_validated(validated))
        for index, p, best in zip(indices, p_values, may_be_best(right, units), strict=True):
            judged[index] = replace(results[index], p_vs_best=p, in_best_set=bool(best) if len(indices) > 1 else None)
    return judged


def compare_with_chosen(right: BoolArray, units: NDArray[np.str_], chosen: int) -> list[float | None]:
    """Compare each of k models with the one chosen on validation, by exact paired tests with Holm's correction.

    Parameters
    ----------
    right : (k, n) bool
        Whether each model predicted each test row right.
    units : (n,) str
        What each row belongs to, see `Predictions.units`.
    chosen : int
        Index of the chosen model, see `best_validated`.

    Returns
    -------
    list of float or None
        P-values, None for the chosen model.

    Examples
    --------
    >>> rows = np.array([f"{i}.png" for i in range(8)])
    >>> compare_with_chosen(np.array([[True] * 8, [False] * 8]), rows, chosen=1)
    [0.0078125, None]
    """
    clusters = number_clusters(units)
    tested = [mcnemar(right[chosen], row, clusters) for row in right]
    return adjusted([None if index == chosen else p for index, p in enumerate(tested)])


def compare_over_splits(
    accuracies: Sequence[Float64Array], chosen: int, n_train: int, n_test: int
) -> list[float | None]:
    """Compare each head with the one chosen on validation, over the same resampled splits.

    This is the corrected t-test with Holm's correction.

    Parameters
    ----------
    accuracies : sequence of (k,) float64
        Accuracies of each head on each split.
    chosen : int
        Index of the chosen head, see `best_validated`.
    n_train, n_test : int
        As for `pipeline.evaluation.intervals.corrected_t_test`.

    Returns
    -------
    list of float or None
        A p-value for each head; None for the chosen one, and for a head whose lead over it is the same on every split.
    """
    tested = [corrected_t_test(accuracies[chosen] - values, n_train, n_test)[1] for values in accuracies]
    return adjusted([None if index == chosen or math.isnan(p) else p for index, p in enumerate(tested)])


def best_validated(validated: Sequence[tuple[float | None, float | None]]) -> int:
    """Return the index of the best of (validation accuracy, its log-loss), see `preference`."""
    ranks = [preference("all", score, index, loss) for index, (score, loss) in enumerate(validated)]
    return ranks.index(max(ranks))


def adjusted(p_values: Sequence[float | None]) -> list[float | None]:
    """Return the p-values after Holm's correction; None stays None."""
    adjusted = iter(holm([p for p in p_values if p is not None]))
    return [None if p is None else next(adjusted) for p in p_values]


def best_notes(results: Sequence[FitResult], level: float = CONFIDENCE) -> list[str]:
    """Return a note on how many of the results that share their test rows and shots may be the best."""
    compared = [result.in_best_set for result in results if result.in_best_set is not None]
    note = f"{sum(compared)} of {len(compared)} results may be the best of those on the same test images"
    return [f"{note} ({100 * level:g} % confidence)"] if compared else []


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
        Metric on validation rows; None or NaN, if nothing was validated, comes last.
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
    validated = -math.inf if score is None or math.isnan(score) else score
    loss = math.inf if log_loss is None or math.isnan(log_loss) else log_loss
    return math.inf if shots == "all" else float(shots), validated, -loss, -index
