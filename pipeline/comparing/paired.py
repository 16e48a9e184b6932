"""Is a difference real? Paired tests on the same test images, of two methods and of all methods of two runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.comparing.folder import RunFolder
from pipeline.comparing.methods import Method, MethodScore, leaderboards
from pipeline.evaluation.comparisons import holm
from pipeline.evaluation.intervals import FEWEST_SPLITS, corrected_t_test, mcnemar
from pipeline.evaluation.predictions import Predictions

LEVEL = 0.05

ReadPredictions = Callable[[str], Predictions]
"""Returns what a model predicted on its test images, by the key of its result."""


@dataclass(frozen=True)
class Paired:
    """A paired test: how much the first method is ahead in accuracy, the two-sided p-value, and the test in words."""

    difference: float
    p: float
    test: str


def compare_scores(
    a: MethodScore, b: MethodScore, read: ReadPredictions, read_b: ReadPredictions | None = None
) -> Paired | None:
    """Compare two methods on the seeds and test images that they share; None if they share none.

    The corrected resampled t-test is used if there are at least five seeds and each draws its own test images.
    Otherwise, and if all seeds show the same difference, McNemar's exact test is made on the images of the first seed.
    `read` reads the predictions of a result of `a`, and `read_b` those of `b` if that is of another run.
    """
    read_b = read_b or read
    seeds = sorted(set(a.by_seed) & set(b.by_seed))
    if not seeds:
        return None
    predictions = {seed: (read(a.by_seed[seed].key), read_b(b.by_seed[seed].key)) for seed in seeds}
    first, second = predictions[seeds[0]]
    drawn = any(not np.array_equal(first.uris, other.uris) for other, _ in predictions.values())
    if drawn and len(seeds) >= FEWEST_SPLITS:
        pairs = [(a.by_seed[seed].result, b.by_seed[seed].result) for seed in seeds]
        differences = np.array([one.accuracy - other.accuracy for one, other in pairs])
        result = pairs[0][0]
        pool = result.n_pool or result.n_train + result.n_val  # old run folders lack n_pool
        _, p = corrected_t_test(differences, pool, result.n_test)
        if not math.isnan(p):
            return Paired(float(differences.mean()), p, f"corrected resampled t-test over {len(seeds)} seeds")
    _, left, right = np.intersect1d(first.uris, second.uris, assume_unique=True, return_indices=True)
    if not len(left):
        return None
    mine, other = first.right[left], second.right[right]
    of_seed = f", seed {seeds[0]}" if len(seeds) > 1 else ""
    words = f"McNemar's exact test on {len(left)} test images{of_seed}"
    return Paired(float(mine.mean() - other.mean()), mcnemar(mine, other), words)


@dataclass(frozen=True)
class Change:
    """A method whose accuracy differs between two runs on what both were tested on; `p` is adjusted for all methods."""

    source: str
    method: str
    shots: int | str
    before: float
    now: float
    difference: float
    p: float


@dataclass(frozen=True)
class Against:
    """How many methods two runs share, which of these changed by more than noise, and which only one run has."""

    compared: int
    changed: Sequence[Change]
    only_before: Sequence[str]
    only_now: Sequence[str]


def compare_runs(before: RunFolder, now: RunFolder) -> Against:
    """Compare all methods that two runs share on the test images that they share."""
    old, new = _scores(before, now), _scores(now, before)
    tests = {key: compare_scores(new[key], old[key], now.predictions, before.predictions) for key in old if key in new}
    tested = [(key, paired) for key, paired in tests.items() if paired is not None]
    adjusted = holm([paired.p for _, paired in tested])
    changes = [
        Change(key[0], new[key].name, key[2], old[key].accuracy, new[key].accuracy, paired.difference, p)
        for (key, paired), p in zip(tested, adjusted, strict=True)
        if p < LEVEL
    ]
    return Against(
        len(tested),
        sorted(changes, key=lambda change: -abs(change.difference)),
        [_text(key[0], score) for key, score in old.items() if key not in new],
        [_text(key[0], score) for key, score in new.items() if key not in old],
    )


def _scores(run: RunFolder, other: RunFolder) -> dict[tuple[str, Method, int | str], MethodScore]:
    """Return a run's scores by source, method and shots, with names that tell apart the methods of both runs."""
    found = leaderboards(run.results.values(), other.results.values())
    return {(board.source, *key): score for board in found for key, score in board.scores.items()}


def _text(source: str, score: MethodScore) -> str:
    return f"{score.name}, shots {score.shots}, {source}"
