"""How certain a measured number is: intervals around one result and around the difference of two, and a paired test.

Test rows may come in groups, such as the photos of one person, whose rows are alike. Then there is less to learn from
them than from as many independent rows; `effective_rows` says how much less. Everywhere here `clusters` (n,) numbers
what each row belongs to, and is None if every row stands for itself.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from scipy.special import bdtr, stdtr, stdtrit

from pipeline.arrays import BoolArray, Float64Array, IntArray, StrArray
from pipeline.errors import FitError

CONFIDENCE = 0.95
FEWEST_SPLITS = 5
"""With fewer, the spread over splits is too uncertain to test a difference."""

SAME = 1e-9
"""Accuracies are ratios of counts, so a smaller difference is rounding."""


def wilson(successes: float, n: float, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return Wilson's score interval for a proportion (Wilson 1927).

    `scipy.stats.binomtest` gives the same interval, but also computes a p-value, which takes up to a millisecond, and
    takes whole numbers only.

    Parameters
    ----------
    successes, n : float
        Number of rows predicted right, and of all rows; of rows in groups, what `effective_rows` makes of them.
    confidence : float, default 0.95
        Nominal coverage.

    Raises
    ------
    FitError
        If `n` is 0.

    Examples
    --------
    >>> low, high = wilson(90, 100)
    >>> f"{low:.3f} to {high:.3f}"
    '0.826 to 0.945'
    """
    if n <= 0:
        raise FitError("an interval needs at least one test row, got none")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / n
    centre = share + z * z / (2 * n)
    reach = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # the bounds at 0 and n are exactly 0 and 1; rounding must not move them past the share itself
    low = 0.0 if successes == 0 else (centre - reach) / scale
    high = 1.0 if successes == n else (centre + reach) / scale
    return low, high


def accuracy_interval(accuracy: float, n_test: int, n_effective: float | None = None) -> tuple[float, float]:
    """Return Wilson's 95 % interval of an accuracy, or of its mean over seeds, for the test rows of one seed.

    `n_effective` is that of `effective_rows`; None, as in old run folders, takes the rows for independent.
    """
    n = n_test if n_effective is None else n_effective
    return wilson(accuracy * n, n)


def number_clusters(units: StrArray) -> IntArray | None:
    """Number the rows (n,) by what they belong to; return None if every row stands for itself."""
    names, clusters = np.unique(units, return_inverse=True)
    return None if len(names) == len(units) else clusters


def effective_rows(values: Float64Array, clusters: IntArray | None, confidence: float = CONFIDENCE) -> float:
    """Return how many independent rows would tell the mean of `values` as precisely as these rows in clusters do.

    This is the number of rows divided by the design effect: the variance of the mean between clusters over that of
    independent rows (Kish 1965), at least 1. Few clusters estimate this variance badly; Student's t in place of the
    normal distribution accounts for that (Korn and Graubard 1998). Where all values are equal, nothing can be
    estimated, and the rows of a cluster count as one.

    Examples
    --------
    >>> values = np.repeat([1.0, 0.0, 1.0, 1.0, 0.0, 1.0], 10)  # six persons, ten equal photos of each
    >>> f"{effective_rows(values, np.repeat(np.arange(6), 10)):.1f}"
    '3.0'
    """
    n = len(values)
    if clusters is None:
        return float(n)
    sizes = np.bincount(clusters)
    count = len(sizes)
    if count == 1:
        return 1.0
    errors = values - values.mean()
    totals = np.bincount(clusters, weights=errors)
    of_rows = errors @ errors * n / (n - 1)
    between = totals @ totals * count / (count - 1)
    effect = max(1.0, between / of_rows) if of_rows > 0 else float(sizes @ sizes) / n
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    return float(n / effect * (z / stdtrit(count - 1, 0.5 + confidence / 2)) ** 2)


def paired_interval(
    right_a: BoolArray, right_b: BoolArray, clusters: IntArray | None = None, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Return an interval for how much more often model a is right than model b, on the same test rows.

    This is Tango's score interval (Tango 1998) for `effective_rows` of the differences. Where it would leave out 0
    although `mcnemar` finds no difference at this level, it is extended to 0: it never claims more than the exact test.

    Parameters
    ----------
    right_a, right_b : (n,) bool
        Whether each model predicted each row right.
    clusters : (n,) int64, optional
    confidence : float, default 0.95

    Examples
    --------
    >>> low, high = paired_interval(np.arange(100) < 90, np.arange(100) < 84)
    >>> f"{low:.3f} to {high:.3f}"
    '0.021 to 0.125'
    """
    differences = right_a.astype(np.int64) - right_b
    n = effective_rows(differences.astype(np.float64), clusters, confidence)
    low, high = tango(n * float(np.mean(differences > 0)), n * float(np.mean(differences < 0)), n, confidence)
    if (low > 0 or high < 0) and mcnemar(right_a, right_b, clusters) >= 1 - confidence:
        return min(low, 0.0), max(high, 0.0)
    return low, high


def tango(only_a: float, only_b: float, n: float, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return Tango's score interval for the difference of two paired proportions (Tango 1998).

    `only_a` and `only_b` of `n` rows were predicted right by model a alone and by model b alone. The interval holds the
    differences that a score test does not reject.
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2)

    def score(difference: float) -> float:
        linear = (2 * n - only_a + only_b) * difference - only_a - only_b
        constant = -only_b * difference * (1 - difference)
        likeliest = (math.sqrt(max(linear * linear - 8 * n * constant, 0)) - linear) / (4 * n)  # share of b alone
        variance = n * (2 * likeliest + difference * (1 - difference))
        ahead = only_a - only_b - n * difference
        return ahead / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, ahead) if ahead else 0.0

    def bound(inside: float, outside: float) -> float:
        for _ in range(60):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if abs(score(middle)) <= z else (inside, middle)
        return inside

    estimate = (only_a - only_b) / n
    return bound(estimate, -1.0), bound(estimate, 1.0)


def mcnemar(right_a: BoolArray, right_b: BoolArray, clusters: IntArray | None = None) -> float:
    """Test whether two models err equally often on the same test rows; return the exact two-sided p-value.

    If they do, then in each cluster one model is as likely to be ahead by a number of rows as the other. Without
    clusters this is McNemar's exact test (McNemar 1947); with clusters, the signs of their totals are flipped.

    Parameters
    ----------
    right_a, right_b : (n,) bool
        Whether each model predicted each row right.
    clusters : (n,) int64, optional

    Raises
    ------
    FitError
        If the two have different numbers of rows.

    Examples
    --------
    >>> mcnemar(np.array([True] * 6), np.array([False] * 6))
    0.03125
    >>> mcnemar(np.array([True] * 6), np.array([False] * 6), np.array([0, 0, 1, 1, 2, 2]))
    0.25
    """
    if right_a.shape != right_b.shape:
        raise FitError(f"expected two models on one test set, got {len(right_a)} and {len(right_b)} rows")
    leads = right_a.astype(np.int64) - right_b
    if clusters is not None:
        leads = np.bincount(clusters, weights=leads).astype(np.int64)
    sizes, counts = np.unique(np.abs(leads[leads != 0]), return_counts=True)
    chances = np.ones(1)  # of each sum of the leads that are a's, if every lead is a's or b's by the toss of a coin
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        tossed = np.zeros(size * count + 1)
        tossed[::size] = np.diff(bdtr(np.arange(count + 1.0), count, 0.5), prepend=0)
        chances = np.convolve(chances, tossed)
    fewer = int(min(leads[leads > 0].sum(), -leads[leads < 0].sum()))
    return min(1.0, 2.0 * float(chances[: fewer + 1].sum()))


def smallest_difference(n: float, disagreement: float, comparisons: float = 1, power: float = 0.8) -> float:
    """Return the smallest difference of two accuracies that a paired test at 5 % finds with this power.

    This is the usual formula for McNemar's test (Connor 1987). Two models that differ by a share d disagree on a share
    d of the rows or more; where `disagreement` is less than the result would be, the result is taken for it.

    Parameters
    ----------
    n : float
        Number of test rows; of rows in groups, what `effective_rows` makes of them.
    disagreement : float
        Share of the rows on which one model is right and the other is not.
    comparisons : float, default 1
        Number of tests planned, each then at 5 % / `comparisons` (Bonferroni's correction).
    power : float, default 0.8

    Examples
    --------
    >>> f"{smallest_difference(400, 0.1):.3f} {smallest_difference(400, 0.1, comparisons=10):.3f}"
    '0.044 0.057'
    """
    z_level = NormalDist().inv_cdf(1 - (1 - CONFIDENCE) / comparisons / 2)
    z_power = NormalDist().inv_cdf(power)
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        share = max(disagreement, middle)
        found = middle * math.sqrt(n) >= z_level * math.sqrt(share) + z_power * math.sqrt(share - middle * middle)
        low, high = (low, middle) if found else (middle, high)
    return high


def corrected_t_test(differences: Float64Array, n_train: int, n_test: int) -> tuple[float, float]:
    """Compare two models over repeated splits, corrected for their overlap (Nadeau & Bengio 2003).

    The plain t-test assumes independent splits, so it finds differences that do not exist. Here the variance of the
    mean is ``(1 / k + n_test / n_train)`` times the sample variance.

    Parameters
    ----------
    differences : (k,) float64
        Score of one model minus score of the other on each split; k at least 2.
    n_train, n_test : int
        Number of rows on the two sides of a split: all rows available for training, even if few of them are drawn, and
        test rows.

    Returns
    -------
    t : float
        The statistic, with k - 1 degrees of freedom.
    p : float
        Two-sided p-value. Without any spread it is 1 if the mean is 0, and NaN otherwise.

    Raises
    ------
    FitError
        If there are fewer than two differences.

    Examples
    --------
    >>> t, p = corrected_t_test(np.array([0.02, 0.03, 0.01, 0.02, 0.02]), n_train=800, n_test=200)
    >>> f"{t:.2f} {p:.3f}"
    '4.22 0.014'
    """
    k = len(differences)
    if k < 2:
        raise FitError(f"a test over seeds needs at least two seeds, got {k}")
    mean = float(np.mean(differences))
    if np.ptp(differences) < SAME:
        return (0.0, 1.0) if abs(mean) < SAME else (math.copysign(math.inf, mean), math.nan)
    t = mean / corrected_error(differences, n_train, n_test)
    return t, 2 * float(stdtr(k - 1, -abs(t)))


def corrected_error(differences: Float64Array, n_train: int, n_test: int) -> float:
    """Return the standard error of the mean difference over repeated splits, as `corrected_t_test` has it."""
    return math.sqrt(float(np.var(differences, ddof=1)) * (1 / len(differences) + n_test / n_train))
