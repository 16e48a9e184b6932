"""What another test set might have given: test rows are drawn again, in whole groups, the same ones for all models.

For metrics that are no shares of rows, such as R² or average precision. Accuracies have exact intervals and tests, see
`pipeline.evaluation.intervals`.

A bootstrap of m groups underestimates a variance by a factor of about (m - 1) / m, and takes Student's t distribution
with m - 1 degrees of freedom for a normal one. That matters where few rows tell a part of a metric, such as the five
test images that have some rare label; so errors are widened by both (Satterthwaite 1946 for the degrees of freedom of a
sum).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from scipy.special import ndtr, ndtri, stdtrit

from pipeline.arrays import BoolArray, Float32Array, Float64Array, FloatArray, IntArray, StrArray
from pipeline.evaluation.comparisons import adjusted, step_down
from pipeline.evaluation.intervals import CONFIDENCE

MOST_DRAWS = 1999  # with the observed set 2000, of which 5 % are a whole number
FEWEST_DRAWS = 199
"""Of large test sets, whose metrics hardly vary, fewer are drawn: about `_MOST_CELLS` over rows times parts."""

_MOST_CELLS = 400_000_000
_CELLS = 1 << 22  # weights held at once
_SAME = 1e-12
"""Differences of at most this share of the values come from rounding."""

Statistic = Callable[[FloatArray], FloatArray]
"""Maps how often each row was drawn, (b, n), to the parts (b, k) whose mean is a metric of these b test sets, such as
the average precision of each label; NaN where one is not defined."""


@dataclass(frozen=True, eq=False)
class Redrawn:
    """A metric of one model, and what it is on test sets that were drawn again.

    Parameters
    ----------
    observed : float
        Larger is better.
    draws : (b,) float64
        NaN where the metric is not defined.
    parts : (b, k) float64
        What the draws are means of.
    telling : (k,) float64
        How many groups of rows tell each part, see `effective_groups`: of a label, the groups of the rows that have it,
        or of those that lack it, whichever are fewer.
    """

    observed: float
    draws: Float64Array
    parts: Float64Array
    telling: Float64Array

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float] | None:
        """Return the bias-corrected percentile interval (Efron 1987, without acceleration), widened.

        None where no draw differs from the others, as with a single group of rows, or if nothing is predicted wrong:
        then the rows do not tell how far the metric may be from what it is on others.
        """
        known = np.sort(self.draws[~np.isnan(self.draws)])
        if not len(known) or known[-1] - known[0] <= _SAME * np.abs(known).max():
            return None
        below = (np.sum(known < self.observed) + np.sum(known <= self.observed)) / 2 / len(known)
        shift = 2 * ndtri(np.clip(below, 0.5 / len(known), 1 - 0.5 / len(known)))
        tail = ndtri((1 - confidence) / 2)
        low, high = np.quantile(known, ndtr([shift + tail, shift - tail]))
        wider = _widening(self.parts, self.telling, confidence)
        return (
            self.observed - wider * max(0.0, self.observed - float(low)),
            self.observed + wider * max(0.0, float(high) - self.observed),
        )


def redraw(
    statistics: Sequence[Statistic], units: Sequence[StrArray], telling: Sequence[Float64Array], sign: int = 1
) -> Redrawn:
    """Draw test sets again, and compute a metric, or its mean over seeds, on each.

    Parameters
    ----------
    statistics : sequence
        One for each seed.
    units : sequence of (n,) str
        What the test rows of each seed belong to. What several seeds test is drawn for all of them together.
    telling : sequence of (k,) float64
        See `Redrawn`.
    sign : int, default 1
        -1 if less is better.
    """
    clusters = np.unique(np.concatenate(units), return_inverse=True)[1]
    sizes = [len(one) for one in units]
    ends = np.cumsum(sizes)[:-1]
    draws, parts = [], []
    for weights in _weights(clusters, len(telling[0])):
        of_seeds = zip(statistics, np.split(weights, ends, axis=1), strict=True)
        found = [np.asarray(statistic(own), np.float64) for statistic, own in of_seeds]
        draws.append(np.mean([mean_known(one) for one in found], axis=0))
        parts.append(found[0] if len(found) == 1 else mean_known(np.stack(found, axis=1)))
    observed = [mean_known(one(np.ones((1, size))))[0] for one, size in zip(statistics, sizes, strict=True)]
    return Redrawn(
        sign * float(np.mean(observed)),
        sign * np.concatenate(draws),
        sign * np.concatenate(parts),
        np.min(telling, axis=0),
    )


@dataclass(frozen=True)
class Lead:
    """By how much a model may be ahead of another on other test rows, and the two-sided p-value of their difference."""

    low: float
    high: float
    p: float


def lead(ahead: Redrawn, behind: Redrawn, confidence: float = CONFIDENCE) -> Lead | None:
    """Compare two models by a metric of the same test sets; None where these do not differ, as with a single group.

    With the usual confidence, the interval leaves out 0 if and only if p is at most 5 %.
    """
    known = ~np.isnan(ahead.draws) & ~np.isnan(behind.draws)
    found = np.stack([ahead.draws[known], behind.draws[known]])
    size = np.abs(found).max(initial=0.0)
    if not found.shape[1] or np.ptp(found, axis=1).max() <= _SAME * size:
        return None
    difference = ahead.observed - behind.observed
    chance = np.abs(found[0] - found[1] - (found[0] - found[1]).mean())
    parts, telling = ahead.parts - behind.parts, np.minimum(ahead.telling, behind.telling)
    beyond = int(np.sum(_widening(parts, telling) * chance >= abs(difference) - _SAME * size))
    allowed = math.floor((1 - confidence) * (1 + len(chance)) + 1e-9)  # draws that may be beyond, with the observed one
    if allowed:
        reach = float(np.sort(chance)[-allowed])
    else:  # too few draws for so high a confidence
        reach = float(max(chance.max(), NormalDist().inv_cdf(0.5 + confidence / 2) * np.sqrt(np.mean(chance**2))))
    reach *= _widening(parts, telling, confidence)
    return Lead(difference - reach, difference + reach, (1 + beyond) / (1 + len(chance)))


def effective_groups(units: StrArray) -> float:
    """Return how many groups of one size the groups of rows (n,) are worth: (Σ sizes)² / Σ sizes²."""
    sizes = np.unique(units, return_counts=True)[1].astype(np.float64)
    return float(sizes.sum() ** 2 / (sizes @ sizes)) if len(sizes) else 0.0


def mean_known(values: FloatArray) -> Float64Array:
    """Return means (b, ...) over those of `values` (b, k, ...) that are defined; NaN where none is."""
    count = (~np.isnan(values)).sum(axis=1)
    return np.where(count > 0, np.nansum(values, axis=1) / np.maximum(count, 1), np.nan)


def compare_redrawn(
    models: Sequence[Redrawn], chosen: int, level: float = CONFIDENCE
) -> tuple[list[float | None], BoolArray] | None:
    """Compare k models by a metric of the same test sets; None where these do not differ, as with a single group.

    Parameters
    ----------
    models : sequence of Redrawn
    chosen : int
        Index of the model that others are tested against, the best on validation rows.
    level : float, default 0.95

    Returns
    -------
    p_values : list of float or None
        Two-sided, at least one over the number of draws, with Holm's correction; None for the chosen model.
    may_be_best : (k,) bool
        As `pipeline.evaluation.comparisons.may_be_best`.
    """
    found = np.stack([model.draws for model in models])
    found = found[:, ~np.isnan(found).any(axis=0)]
    size = np.abs(found).max(initial=0.0)
    if not found.shape[1] or np.ptp(found, axis=1).max() <= _SAME * size:
        return None
    observed = np.array([model.observed for model in models])
    leads, by_chance = [], []
    p_values: list[float | None] = []
    for number, model in enumerate(models):
        differences = found - found[number]
        spread = np.std(differences, axis=1)
        spread[spread <= _SAME * size] = size  # the two are the same, and their difference is 0
        wider = [_widening(other.parts - model.parts, np.minimum(other.telling, model.telling)) for other in models]
        of_rivals = (observed - observed[number]) / (spread * wider)
        chance = (differences - differences.mean(axis=1, keepdims=True)) / spread[:, None]
        leads.append(of_rivals.max())
        by_chance.append(chance.max(axis=0))
        compared = lead(model, models[chosen])
        p_values.append(None if number == chosen else 1.0 if compared is None else compared.p)
    return adjusted(p_values), step_down(np.array(leads), np.stack(by_chance, axis=1), level)


def _weights(clusters: IntArray, parts: int) -> Iterator[Float32Array]:
    """Yield how often each row is drawn, (b, n); the same for equal numbers of clusters, rows and parts."""
    count = int(clusters.max()) + 1
    draws = int(np.clip(_MOST_CELLS // (len(clusters) * parts), FEWEST_DRAWS, MOST_DRAWS))
    rng = np.random.default_rng(0)
    step = max(1, _CELLS // len(clusters))
    for start in range(0, draws, step):
        size = min(step, draws - start)
        drawn = rng.integers(0, count, (size, count)) + count * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count)[:, clusters].astype(np.float32)


def _widening(parts: Float64Array, telling: Float64Array, confidence: float = CONFIDENCE) -> float:
    """Return by how much the error of the mean of `parts` (b, k) is too small for an interval of this confidence."""
    known = ~np.isnan(parts)
    count = np.maximum(known.sum(axis=0), 1)
    mean = np.nansum(parts, axis=0) / count
    variances = np.where(known, (parts - mean) ** 2, 0).sum(axis=0) / count
    if not variances.any():
        return 1.0
    variances /= variances.max()  # so that squares of tiny ones are not 0
    freedom = np.maximum(telling - 1, 1)
    right = variances * (freedom + 1) / freedom
    of_sum = float(right.sum() ** 2 / np.sum(right**2 / freedom))
    at = 0.5 + confidence / 2
    return math.sqrt(right.sum() / variances.sum()) * float(stdtrit(of_sum, at)) / NormalDist().inv_cdf(at)
