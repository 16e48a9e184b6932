"""Is a difference real? Methods of one run compared on the test images that they share, and all methods of two runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from pipeline.arrays import BoolArray, IntArray, StrArray
from pipeline.comparing.folder import RunFolder
from pipeline.comparing.methods import Leaderboard, Method, MethodScore, best_of, is_validated, leaderboards
from pipeline.evaluation.comparisons import holm, may_be_best
from pipeline.evaluation.intervals import (
    CONFIDENCE,
    FEWEST_SPLITS,
    corrected_error,
    corrected_t_test,
    effective_rows,
    mcnemar,
    number_clusters,
    paired_interval,
    smallest_difference,
)
from pipeline.evaluation.predictions import Predictions

LEVEL = 1 - CONFIDENCE

ReadPredictions = Callable[[str], Predictions]
"""Returns what a model predicted on its test images, by the key of its result."""


@dataclass(frozen=True)
class Paired:
    """Two methods on what they share: the accuracies of both there, and how much the first is ahead.

    Parameters
    ----------
    first, second : float
        Accuracies, means over seeds.
    low, high : float
        Interval of the difference.
    p : float
        Two-sided p-value.
    test : str
        Its name.
    n_seeds, n_images, n_groups : int
        Seeds, different test images of all seeds, and groups of these; an image without a group counts as one.
    smallest : float or None
        The difference that such a test finds with 80 % power; None for a test over seeds.
    spread : (float, float) or None
        The smallest and the largest difference of a seed; None for a single one.
    shared : bool
        Whether all seeds have the same test images, so that they differ in what they were trained on alone.
    """

    first: float
    second: float
    low: float
    high: float
    p: float
    test: str
    n_seeds: int
    n_images: int
    n_groups: int
    smallest: float | None
    spread: tuple[float, float] | None
    shared: bool

    @property
    def difference(self) -> float:
        """How much the first method is ahead."""
        return self.first - self.second

    @property
    def is_real(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


def compare_scores(
    a: MethodScore,
    b: MethodScore,
    read: ReadPredictions,
    read_b: ReadPredictions | None = None,
    confidence: float = CONFIDENCE,
) -> Paired | None:
    """Compare two methods on the seeds and test images that they share; None if they share none.

    With at least five seeds that draw their own test images, this is the corrected resampled t-test over seeds.
    Otherwise, and if all seeds show the same difference, it is an exact paired test on the test images of all seeds, in
    which an image (or a group of them) counts once however many seeds test it.

    `read` reads the predictions of a result of `a`, and `read_b` those of `b` if that is of another run; `confidence`
    is that of the interval.
    """
    seeds = sorted(set(a.by_seed) & set(b.by_seed))
    found = [_pool(seed, (a, b), (read, read_b or read)) for seed in seeds]
    found = [one for one in found if one[1].size]
    if not found:
        return None
    right, units = np.concatenate([one[0] for one in found], axis=1), np.concatenate([one[1] for one in found])
    uris = [one[2] for one in found]
    shared = all(np.array_equal(uris[0], other) for other in uris)
    first, second = right
    of_seeds = np.array([one[0][0].mean() - one[0][1].mean() for one in found])
    clusters = number_clusters(units)
    low, high = paired_interval(first, second, clusters, confidence)
    p, test = mcnemar(first, second, clusters), "McNemar's exact test"
    n_effective = effective_rows(first.astype(np.float64) - second, clusters)
    smallest: float | None = smallest_difference(n_effective, float((first != second).mean()))
    if not shared and len(found) >= FEWEST_SPLITS:
        result = a.first.result
        sizes = (result.n_pool or result.n_train + result.n_val, result.n_test)  # old run folders lack n_pool
        over_seeds = corrected_t_test(of_seeds, *sizes)[1]
        if not math.isnan(over_seeds):
            reach = float(stdtrit(len(found) - 1, 0.5 + confidence / 2)) * corrected_error(of_seeds, *sizes)
            p, low, high = over_seeds, float(of_seeds.mean()) - reach, float(of_seeds.mean()) + reach
            test, smallest = f"corrected resampled t-test over {len(found)} seeds", None
    return Paired(
        first=float(first.mean()),
        second=float(second.mean()),
        low=low,
        high=high,
        p=p,
        test=test,
        n_seeds=len(found),
        n_images=len(np.unique(np.concatenate(uris))),
        n_groups=len(np.unique(units)),
        smallest=smallest,
        spread=(float(of_seeds.min()), float(of_seeds.max())) if len(found) > 1 else None,
        shared=shared,
    )


def _pool(
    seed: int, scores: Sequence[MethodScore], reads: Sequence[ReadPredictions]
) -> tuple[BoolArray, StrArray, StrArray]:
    """Return which of a seed's test images that all methods share each predicted right, their units and their names."""
    said = [read(score.by_seed[seed].key) for score, read in zip(scores, reads, strict=True)]
    uris = said[0].uris
    for other in said[1:]:
        if not np.array_equal(uris, other.uris):
            uris = np.intersect1d(uris, other.uris)
    rows = [_rows_of(one.uris, uris) for one in said]
    right = np.array([one.right[own] for one, own in zip(said, rows, strict=True)])
    return right, said[0].units[rows[0]], uris


def _rows_of(names: StrArray, wanted: StrArray) -> IntArray:
    order = np.argsort(names)
    return np.asarray(order[np.searchsorted(names, wanted, sorter=order)])


@dataclass(frozen=True)
class BestSet:
    """The methods on one source that may be the best at one number of labels, as trained in this run.

    `chosen` has the best validation accuracy of the `compared` ones, None where not all were validated.
    """

    source: str
    shots: int | str
    compared: int
    chosen: str | None
    methods: list[str]


def best_set(board: Leaderboard, shots: int | str, read: ReadPredictions) -> BestSet | None:
    """Return the methods that may be the best at this number of labels, by the seeds and test images that all share.

    None if there is a single method, or if they share no test images.
    """
    scores = board.at(shots)
    seeds = sorted(set.intersection(*(set(score.by_seed) for score in scores)))
    found = [_pool(seed, scores, [read] * len(scores)) for seed in seeds] if len(scores) > 1 else []
    if not sum(one[1].size for one in found):
        return None
    right, units = np.concatenate([one[0] for one in found], axis=1), np.concatenate([one[1] for one in found])
    chosen = best_of(scores)
    named = chosen.name if chosen is not None and is_validated(scores) else None
    methods = [score.name for score, best in zip(scores, may_be_best(right, units), strict=True) if best]
    return BestSet(board.source, shots, len(scores), named, methods)


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
        Change(key[0], new[key].name, key[3], old[key].accuracy, new[key].accuracy, paired.difference, p)
        for (key, paired), p in zip(tested, adjusted, strict=True)
        if p < LEVEL
    ]
    return Against(
        len(tested),
        sorted(changes, key=lambda change: -abs(change.difference)),
        [_text(key[0], score) for key, score in old.items() if key not in new],
        [_text(key[0], score) for key, score in new.items() if key not in old],
    )


def _scores(run: RunFolder, other: RunFolder) -> dict[tuple[str, str | None, Method, int | str], MethodScore]:
    """Return a run's scores by source, target, method and shots; names tell apart the methods of both runs."""
    found = leaderboards(run.results.values(), other.results.values())
    return {
        (board.source, score.first.result.target, *key): score for board in found for key, score in board.scores.items()
    }


def _text(source: str, score: MethodScore) -> str:
    return f"{score.name}, shots {score.shots}, {source}"
