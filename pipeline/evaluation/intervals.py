"""What a measured number is worth: intervals around one result, tests between two."""

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
"""Below that many, the spread over splits is too uncertain to judge a difference by."""

_SAME = 1e-9  # accuracies are shares of counts: what is nearer is rounding
_CHUNK = 1 << 22  # resampled row numbers held at once: 32 MiB


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval for a share (Wilson 1927).

    Parameters
    ----------
    successes, n : int
        Rows predicted right, and rows.
    confidence : float, default 0.95
        Coverage aimed at.

    Raises
    ------
    FitError
        If `n` is 0.
    """
    if n < 1:
        raise FitError("an interval needs at least one test row, got none")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / n
    centre = share + z * z / (2 * n)
    reach = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # at 0 and n the bounds are exactly 0 and 1; rounding must not push them past the share itself
    low = 0.0 if successes == 0 else (centre - reach) / scale
    high = 1.0 if successes == n else (centre + reach) / scale
    return low, high


def bootstrap(
    statistic: Callable[[IntArray], Float64Array], n: int, draws: int = 2000, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of a statistic over test rows (Efron 1979).

    Not for accuracy near 1 on small tests, where it covers far too little: `wilson` is made for that.

    Parameters
    ----------
    statistic : callable
        Maps row numbers (draws, n) to values (draws,): one bootstrap sample a line.
    n : int
        Number of test rows.
    draws : int, default 2000
        Number of bootstrap samples.
    confidence : float, default 0.95
        Coverage aimed at.
    seed : int, default 0
        Seed of the resampling.

    Raises
    ------
    FitError
        If `n` is 0.
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
    """Return the two-sided exact p-value that two models err equally often on one test set (McNemar 1947).

    Parameters
    ----------
    right_a, right_b : (n,) bool
        Whether each model predicted each row right.

    Raises
    ------
    FitError
        If the two are not about the same rows.
    """
    if right_a.shape != right_b.shape:
        raise FitError(f"two models are compared on one test set, got {len(right_a)} and {len(right_b)} rows")
    only_a = int(np.sum(right_a & ~right_b))
    only_b = int(np.sum(right_b & ~right_a))
    return min(1.0, 2.0 * float(bdtr(min(only_a, only_b), only_a + only_b, 0.5)))


def corrected_t_test(differences: Float64Array, n_train: int, n_test: int) -> tuple[float, float]:
    """Compare two models over repeated splits, corrected for their overlap (Nadeau & Bengio 2003).

    The plain t-test takes the splits for independent and finds differences that are not there; here the variance of
    the mean is ``(1 / k + n_test / n_train)`` times the sample variance.

    Parameters
    ----------
    differences : (k,) float64
        Score of one model minus score of the other, a split each; k at least 2.
    n_train, n_test : int
        Rows of a split's two sides: all those that may be trained on, also where few of them are drawn, and test rows.

    Returns
    -------
    t : float
        The statistic, with k - 1 degrees of freedom.
    p : float
        Two-sided p-value. Without any spread it is 1 for a mean of 0, and NaN otherwise: nothing tells how sure it is.

    Raises
    ------
    FitError
        If there are fewer than two differences.
    """
    k = len(differences)
    if k < 2:
        raise FitError(f"a test over seeds needs at least two of them, got {k}")
    mean = float(np.mean(differences))
    if np.ptp(differences) < _SAME:
        return (0.0, 1.0) if abs(mean) < _SAME else (math.copysign(math.inf, mean), math.nan)
    t = mean / math.sqrt(float(np.var(differences, ddof=1)) * (1 / k + n_test / n_train))
    return t, 2 * float(stdtr(k - 1, -abs(t)))
