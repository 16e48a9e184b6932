"""How certain a measured number is: intervals around one result, tests between two."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr, stdtr

from pipeline.arrays import Float64Array, IntArray
from pipeline.errors import FitError

FEWEST_SPLITS = 5
"""With fewer, the spread over splits is too uncertain to test a difference."""

_SAME = 1e-9  # accuracies are ratios of counts, so a smaller difference is rounding
_CHUNK = 1 << 22  # resampled row numbers held at once: 32 MiB


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval for a proportion (Wilson 1927).

    `scipy.stats.binomtest` gives the same interval, but also computes a p-value, which takes up to a millisecond.

    Parameters
    ----------
    successes, n : int
        Number of rows predicted right, and of all rows.
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
    if n < 1:
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


def bootstrap(
    statistic: Callable[[IntArray], Float64Array], n: int, draws: int = 2000, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of a statistic over test rows (Efron 1979).

    Use `wilson` for accuracy: near 1 on a small test set, the bootstrap covers far too little.

    Parameters
    ----------
    statistic : callable
        Maps row numbers (draws, n), one bootstrap sample per row, to values (draws,).
    n : int
        Number of test rows.
    draws : int, default 2000
        Number of bootstrap samples.
    confidence : float, default 0.95
        Nominal coverage.
    seed : int, default 0
        Seed of the resampling.

    Raises
    ------
    FitError
        If `n` is 0.

    Examples
    --------
    >>> values = np.arange(100.0)
    >>> low, high = bootstrap(lambda rows: values[rows].mean(axis=1), 100)
    >>> low < 49.5 < high
    True
    """
    if n < 1:
        raise FitError("an interval needs at least one test row, got none")
    rng = np.random.default_rng(seed)
    step = max(1, _CHUNK // n)
    sizes = [min(step, draws - start) for start in range(0, draws, step)]
    values = np.concatenate([statistic(rng.integers(0, n, (size, n))) for size in sizes])
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def mcnemar(right_a: NDArray[np.bool_], right_b: NDArray[np.bool_]) -> float:
    """Test whether two models err equally often on one test set; return the exact two-sided p-value (McNemar 1947).

    Parameters
    ----------
    right_a, right_b : (n,) bool
        Whether each model predicted each row right.

    Raises
    ------
    FitError
        If the two have different numbers of rows.

    Examples
    --------
    >>> mcnemar(np.array([True] * 6), np.array([False] * 6))
    0.03125
    """
    if right_a.shape != right_b.shape:
        raise FitError(f"expected two models on one test set, got {len(right_a)} and {len(right_b)} rows")
    only_a = int(np.sum(right_a & ~right_b))
    only_b = int(np.sum(right_b & ~right_a))
    return min(1.0, 2.0 * float(bdtr(min(only_a, only_b), only_a + only_b, 0.5)))


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
    if np.ptp(differences) < _SAME:
        return (0.0, 1.0) if abs(mean) < _SAME else (math.copysign(math.inf, mean), math.nan)
    t = mean / math.sqrt(float(np.var(differences, ddof=1)) * (1 / k + n_test / n_train))
    return t, 2 * float(stdtr(k - 1, -abs(t)))
