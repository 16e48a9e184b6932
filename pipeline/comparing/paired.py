"""Is a difference between two methods real? Both are asked about the same images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pipeline.comparing.folder import Judged
from pipeline.comparing.methods import Score
from pipeline.evaluation.intervals import corrected_t_test, mcnemar

LEVEL = 0.05


@dataclass(frozen=True)
class Paired:
    """Two methods compared.

    Parameters
    ----------
    difference : float
        Mean accuracy of the first minus that of the second, over the seeds (or images) they share.
    p : float
        Two-sided.
    test : str
        Which test, on what, in words.
    """

    difference: float
    p: float
    test: str


def compare_scores(
    a: Score, b: Score, judged: Callable[[str], Judged], judged_b: Callable[[str], Judged] | None = None
) -> Paired | None:
    """Compare two methods on what they share.

    Where seeds draw the test images, the corrected resampled t-test over seeds is used; where all seeds have the same
    test images, McNemar's exact test on those of the first seed.

    Parameters
    ----------
    a, b : Score
    judged : callable
        Returns what a model said about its test images, by the key of its record.
    judged_b : callable, optional
        The same for the records of `b`, where these are of another run.

    Returns
    -------
    Paired or None
        None where the two share no seed, or no test image.
    """
    judged_b = judged_b or judged
    seeds = sorted(set(a.records) & set(b.records))
    if not seeds:
        return None
    differences = np.array([a.records[seed]["accuracy"] - b.records[seed]["accuracy"] for seed in seeds])
    said = {seed: (judged(a.records[seed]["key"]), judged_b(b.records[seed]["key"])) for seed in seeds}
    first, second = said[seeds[0]]
    if len(seeds) > 1 and any(not np.array_equal(first.uris, other.uris) for other, _ in said.values()):
        record = a.records[seeds[0]]
        _, p = corrected_t_test(differences, record["n_train"] + record["n_val"], record["n_test"])
        return Paired(float(differences.mean()), p, f"corrected resampled t-test over {len(seeds)} seeds")
    _, left, right = np.intersect1d(first.uris, second.uris, assume_unique=True, return_indices=True)
    if not len(left):
        return None
    p = mcnemar(first.right[left], second.right[right])
    if len(left) < len(first.uris) or len(left) < len(second.uris):
        differences = np.array([first.right[left].mean() - second.right[right].mean()])
    of_seed = f", seed {seeds[0]}" if len(seeds) > 1 else ""
    return Paired(float(differences.mean()), p, f"McNemar's exact test on {len(left)} test images{of_seed}")
