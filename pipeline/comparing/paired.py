"""Is a difference between two methods real? Both are asked about the same images."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pipeline.comparing.methods import Score
from pipeline.evaluation.intervals import FEWEST_SPLITS, corrected_t_test, mcnemar
from pipeline.evaluation.predictions import Predictions

LEVEL = 0.05


@dataclass(frozen=True)
class Paired:
    """Two methods compared.

    Parameters
    ----------
    difference : float
        Accuracy of the first minus that of the second, on what `test` names.
    p : float
        Two-sided.
    test : str
        Which test, on what, in words.
    """

    difference: float
    p: float
    test: str


def compare_scores(
    a: Score, b: Score, judged: Callable[[str], Predictions], judged_b: Callable[[str], Predictions] | None = None
) -> Paired | None:
    """Compare two methods on what they share.

    Where at least five seeds draw their own test images, the corrected resampled t-test over seeds is used; otherwise,
    and where all seeds show the same difference, McNemar's exact test on the images of the first seed.

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
    said = {seed: (judged(a.records[seed]["key"]), judged_b(b.records[seed]["key"])) for seed in seeds}
    first, second = said[seeds[0]]
    drawn = any(not np.array_equal(first.uris, other.uris) for other, _ in said.values())
    if drawn and len(seeds) >= FEWEST_SPLITS:
        differences = np.array([a.records[seed]["accuracy"] - b.records[seed]["accuracy"] for seed in seeds])
        record = a.records[seeds[0]]
        pool = record.get("n_pool", record["n_train"] + record["n_val"])  # runs of before do not say it
        _, p = corrected_t_test(differences, pool, record["n_test"])
        if not math.isnan(p):
            return Paired(float(differences.mean()), p, f"corrected resampled t-test over {len(seeds)} seeds")
    _, left, right = np.intersect1d(first.uris, second.uris, assume_unique=True, return_indices=True)
    if not len(left):
        return None
    mine, other = first.right[left], second.right[right]
    of_seed = f", seed {seeds[0]}" if len(seeds) > 1 else ""
    words = f"McNemar's exact test on {len(left)} test images{of_seed}"
    return Paired(float(mine.mean() - other.mean()), mcnemar(mine, other), words)
