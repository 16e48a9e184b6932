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
from typing import Any

import numpy as np
from scipy.special import ndtr, ndtri, stdtr, stdtrit

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
        Larger is better: if less is, the metric is negated here and in `draws` and `parts`.
    draws : (b,) float64
        NaN where the metric is not defined.
    parts : (b, k) float64
        What the draws are means of.
    telling : (k,) float64
        How many groups of rows tell each part, see `effective_groups`: of a label, the groups of the rows that have it,
        or of those that lack it, whichever are fewer.
    bounds : (float, float)
        The least and the largest value that the metric can have.
    less_is_better : bool, default False
    """

    observed: float
    draws: Float64Array
    parts: Float64Array
    telling: Float64Array
    bounds: tuple[float, float]
    less_is_better: bool = False

    @property
    def value(self) -> float:
        """The metric itself."""
        return -self.observed if self.less_is_better else self.observed

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float] | None:
        """Return the bias-corrected percentile interval (Efron 1987, without acceleration) of the metric, widened.

        Each side is at least as long as Student's t distribution has it, because the draws of a few groups are bounded.
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
        critical = float(_Error.of(self.parts, self.telling).critical(1 - confidence))
        wider, least = critical / float(ndtri(0.5 + confidence / 2)), critical * float(np.std(known))
        ends = [
            self.observed - max(least, wider * (self.observed - float(low))),
            self.observed + max(least, wider * (float(high) - self.observed)),
        ]
        if self.less_is_better:
            ends = [-ends[1], -ends[0]]
        return max(self.bounds[0], ends[0]), min(self.bounds[1], ends[1])


def redraw(
    statistics: Sequence[Statistic],
    units: Sequence[StrArray],
    telling: Sequence[Float64Array],
    bounds: tuple[float, float],
    *,
    less_is_better: bool = False,
) -> Redrawn:
    """Draw test sets again, and compute a metric, or its mean over seeds, on each.

    Parameters
    ----------
    statistics : sequence
        One for each seed.
    units : sequence of (n,) str
        What the test rows of each seed belong to. What several seeds test is drawn for all of them together.
    telling : sequence of (k,) float64
        See `Redrawn`, as for `bounds` and `less_is_better`.
    """
    sign = -1 if less_is_better else 1
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
        bounds,
        less_is_better,
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
    chance = np.sort(np.abs(found[0] - found[1] - (found[0] - found[1]).mean()))[::-1]
    error = _Error.of(ahead.parts - behind.parts, np.minimum(ahead.telling, behind.telling))
    every = np.arange(1, 1 + len(chance)) / (1 + len(chance))  # p-values, with the observed difference among the draws
    beyond = int(np.sum(_reach(chance, chance, every, error) >= abs(difference) - _SAME * size))
    allowed = math.floor((1 - confidence) * (1 + len(chance)) + 1e-9)
    p = allowed / (1 + len(chance)) if allowed else 1 - confidence  # too few draws for so high a confidence
    reach = float(_reach(chance[max(allowed, 1) - 1], chance, p, error))
    return Lead(difference - reach, difference + reach, (1 + beyond) / (1 + len(chance)))


def _reach(quantile: Any, chance: Float64Array, p: Any, error: _Error) -> Any:
    """Return how large a difference must be for a two-sided p-value, or for several, (k,).

    `quantile` is what `chance` (b,) reaches with a probability of `p`, of each.

    It is no smaller than for a normal distribution of the same variance: the draws of a few groups are bounded.
    """
    return error.critical(p) * np.maximum(quantile / ndtri(1 - p / 2), np.sqrt(np.mean(chance**2)))


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
        As `pipeline.evaluation.comparisons.may_be_best`. Leads are compared with the largest among the draws, and with
        the largest that as many independent models would have (Tukey's range), because the draws of a few groups do not
        show how independent models are. A model stays if either comparison keeps it.
    """
    found = np.stack([model.draws for model in models])
    found = found[:, ~np.isnan(found).any(axis=0)]
    size = np.abs(found).max(initial=0.0)
    if not found.shape[1] or np.ptp(found, axis=1).max() <= _SAME * size:
        return None
    observed = np.array([model.observed for model in models])
    leads, spreads = [], []
    p_values: list[float | None] = []
    for number, model in enumerate(models):
        spread = np.std(found - found[number], axis=1)
        spread[spread <= _SAME * size] = size  # the two are the same, and their difference is 0
        errors = [_Error.of(other.parts - model.parts, np.minimum(other.telling, model.telling)) for other in models]
        of_rivals = (observed - observed[number]) / spread
        leads.append(np.max([error.as_normal(one) for error, one in zip(errors, of_rivals, strict=True)]))
        spreads.append(spread)
        compared = lead(model, models[chosen])
        p_values.append(None if number == chosen else 1.0 if compared is None else compared.p)
    drawn = found - found.mean(axis=1, keepdims=True)
    independent = np.random.default_rng(0).standard_normal((len(models), MOST_DRAWS))
    kept = [
        step_down(np.array(leads), _largest(chance, spread), level)
        for chance, spread in ((drawn, np.array(spreads)), (independent, np.full((len(models), 1), math.sqrt(2))))
    ]
    return adjusted(p_values), kept[0] | kept[1]


def _largest(chance: Float64Array, spreads: Float64Array) -> Float64Array:
    """Return the largest lead (b, k) of a rival over each model by chance (k, b), in units of `spreads` (k, k or 1)."""
    leads = [((chance - own) / spread[:, None]).max(axis=0) for own, spread in zip(chance, spreads, strict=True)]
    return np.stack(leads, axis=1)


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


@dataclass(frozen=True)
class _Error:
    """By how much the bootstrap's standard error of a mean is too small, and its degrees of freedom."""

    factor: float
    freedom: float

    @classmethod
    def of(cls, parts: Float64Array, telling: Float64Array) -> _Error:
        """Return that of the mean of `parts` (b, k), each of which so many groups tell (k,)."""
        known = ~np.isnan(parts)
        count = np.maximum(known.sum(axis=0), 1)
        mean = np.nansum(parts, axis=0) / count
        variances = np.where(known, (parts - mean) ** 2, 0).sum(axis=0) / count
        if not variances.any():
            return cls(1.0, math.inf)
        variances /= variances.max()  # so that squares of tiny ones are not 0
        freedom = np.maximum(telling - 1, 1)
        right = variances * (freedom + 1) / freedom
        return cls(math.sqrt(right.sum() / variances.sum()), float(right.sum() ** 2 / np.sum(right**2 / freedom)))

    def critical(self, p: Any) -> Any:
        """Return how many of the bootstrap's standard errors a difference must be for two-sided p-values."""
        return self.factor * stdtrit(self.freedom, 1 - p / 2)

    def as_normal(self, ahead: float) -> float:
        """Return the normal deviate that is as unlikely as so many of the bootstrap's standard errors."""
        return float(np.sign(ahead) * -ndtri(stdtr(self.freedom, -abs(ahead) / self.factor)))
