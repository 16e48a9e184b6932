"""Is a difference real? Methods of one run compared on the test images that they share, and all methods of two runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
from scipy.special import stdtrit

from pipeline.arrays import BoolArray, IntArray, StrArray
from pipeline.comparing.folder import RunFolder
from pipeline.comparing.methods import Leaderboard, Method, MethodScore, best_of, is_validated, leaderboards
from pipeline.evaluation.bootstrap import Redrawn, compare_redrawn, lead
from pipeline.evaluation.comparisons import holm, may_be_best
from pipeline.evaluation.intervals import (
    CONFIDENCE,
    FEWEST_SPLITS,
    SAME,
    corrected_error,
    corrected_t_test,
    effective_rows,
    mcnemar,
    number_clusters,
    paired_interval,
    smallest_difference,
)
from pipeline.evaluation.multilabel import redraw_labels
from pipeline.evaluation.predictions import Predictions
from pipeline.evaluation.regression import redraw_numbers
from pipeline.evaluation.wording import ACCURACY, Measure
from pipeline.options import CLASSIFICATION, REGRESSION

LEVEL = 1 - CONFIDENCE

ReadPredictions = Callable[[str], Predictions]
"""Returns what a model predicted on its test images, by the key of its result."""


@dataclass(frozen=True)
class Paired:
    """Two methods on what they share: how good both are there, and how much the first is ahead.

    Parameters
    ----------
    first, second : float
        Accuracies or other measures, means over seeds.
    low, high : float
        Interval of the difference; above 0 the first is better, also where less is.
    p : float
        Two-sided p-value.
    test : str
        Its name.
    n_seeds, n_images, n_groups : int
        Seeds, different test images of all seeds, and groups of these; an image without a group counts as one.
    smallest : float or None
        The difference that such a test, at the confidence of the interval, finds with 80 % power; None for a test over
        seeds.
    spread : (float, float) or None
        The smallest and the largest difference of a seed; None for a single one.
    shared : bool
        Whether all seeds have the same test images, so that they differ in what they were trained on alone.
    measure : Measure
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
    measure: Measure

    @property
    def difference(self) -> float:
        """How much the first method is ahead."""
        return self.measure.sign * (self.first - self.second)

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

    Accuracies of at least five seeds that draw their own test images are compared by the corrected resampled t-test
    over seeds. Otherwise, and if all seeds show the same difference, it is an exact paired test on the test images of
    all seeds, in which an image (or a group of them) counts once however many seeds test it. Metrics of labels and
    numbers are compared on test images that are drawn again, see `pipeline.evaluation.bootstrap`; the result is None,
    too, if these do not differ, as with a single group.

    `read` reads the predictions of a result of `a`, and `read_b` those of `b` if that is of another run; `confidence`
    is that of the interval.
    """
    said = _shared((a, b), (read, read_b or read))
    if not said[0]:
        return None
    return (_compare_rows if a.task == CLASSIFICATION else _compare_redrawn)(a, said, confidence)


def _compare_rows(a: MethodScore, said: Sequence[Sequence[Predictions]], confidence: float) -> Paired:
    """Compare the accuracies of two methods on the test images of each seed."""
    first, second = (np.concatenate([one.right for one in of_method]) for of_method in said)
    of_seeds = np.array([one.right.mean() - other.right.mean() for one, other in zip(*said, strict=True)])
    told = _describe(a, said[0], of_seeds.tolist())
    clusters = number_clusters(np.concatenate([one.units for one in said[0]]))
    low, high = paired_interval(first, second, clusters, confidence)
    p, test = mcnemar(first, second, clusters), "McNemar's exact test"
    n_effective = effective_rows(first.astype(np.float64) - second, clusters, confidence)
    disagreement, comparisons = float((first != second).mean()), LEVEL / (1 - confidence)
    smallest: float | None = smallest_difference(n_effective, disagreement, comparisons)
    if not told["shared"] and len(of_seeds) >= FEWEST_SPLITS and np.ptp(of_seeds) > SAME:
        result = a.first.result
        sizes = (result.n_pool or result.n_train + result.n_val, result.n_test)  # old run folders lack n_pool
        reach = float(stdtrit(len(of_seeds) - 1, 0.5 + confidence / 2)) * corrected_error(of_seeds, *sizes)
        low, high = float(of_seeds.mean()) - reach, float(of_seeds.mean()) + reach
        p, test = corrected_t_test(of_seeds, *sizes)[1], f"corrected resampled t-test over {len(of_seeds)} seeds"
        smallest = None
    return Paired(float(first.mean()), float(second.mean()), low, high, p, test, smallest=smallest, **told)


def _compare_redrawn(a: MethodScore, said: Sequence[Sequence[Predictions]], confidence: float) -> Paired | None:
    """Compare a metric of labels or numbers on test images that are drawn again."""
    redraw = partial(_redraw, a.task, a.measure.metric)
    first, second = (redraw(*of_method) for of_method in said)
    found = lead(first, second, confidence)
    if found is None:
        return None
    of_seeds = [redraw(one).observed - redraw(other).observed for one, other in zip(*said, strict=True)]
    told = _describe(a, said[0], of_seeds)
    return Paired(
        first.value, second.value, found.low, found.high, found.p, "bootstrap of test images", smallest=None, **told
    )


def _describe(a: MethodScore, said: Sequence[Predictions], of_seeds: Sequence[float]) -> dict[str, Any]:
    """Return what a comparison rests on, for `Paired`: the test images of each seed, and the seeds' differences."""
    uris = [one.uris for one in said]
    return {
        "n_seeds": len(uris),
        "n_images": len(np.unique(np.concatenate(uris))),
        "n_groups": len(np.unique(np.concatenate([one.units for one in said]))),
        "spread": (min(of_seeds), max(of_seeds)) if len(of_seeds) > 1 else None,
        "shared": all(np.array_equal(uris[0], other) for other in uris),
        "measure": a.measure,
    }


@lru_cache(maxsize=16)  # the leading methods are compared with each other
def _redraw(task: str, metric: str, *said: Predictions) -> Redrawn:
    """Return a metric of what a method predicted with each seed, on test images that are drawn again."""
    return (redraw_numbers if task == REGRESSION else redraw_labels)(metric, said)


def _shared(scores: Sequence[MethodScore], reads: Sequence[ReadPredictions]) -> list[list[Predictions]]:
    """Return what each method predicted on the test images that all share, for each seed that has such images.

    An image of which two methods were told different answers is not shared.
    """
    seeds = sorted(set.intersection(*(set(score.by_seed) for score in scores)))
    found: list[list[Predictions]] = [[] for _ in scores]
    for seed in seeds:
        said = [read(score.by_seed[seed].key) for score, read in zip(scores, reads, strict=True)]
        uris = said[0].uris
        for other in said[1:]:
            if not np.array_equal(uris, other.uris):
                uris = np.intersect1d(uris, other.uris)
        said = [one if np.array_equal(one.uris, uris) else one.take(_rows_of(one.uris, uris)) for one in said]
        alike = _told_alike(said)
        first = said[0]  # whose groups hold for all, because the same rows must be drawn
        said = [one if np.array_equal(one.units, first.units) else replace(one, groups=first.groups) for one in said]
        if alike.any():
            for own, one in zip(found, said, strict=True):
                own.append(one if alike.all() else one.take(np.flatnonzero(alike)))
    return found


def _told_alike(said: Sequence[Predictions]) -> BoolArray:
    """Return for which rows (n,) all methods were told the same answer."""
    first, alike = said[0].y_true, np.ones(len(said[0].uris), bool)
    for other in said[1:]:
        if other.y_true.shape[1:] != first.shape[1:]:  # other labels
            return np.zeros_like(alike)
        same = other.y_true == first
        alike &= same if same.ndim == 1 else same.all(axis=1)
    return alike


def _rows_of(names: StrArray, wanted: StrArray) -> IntArray:
    order = np.argsort(names)
    return np.asarray(order[np.searchsorted(names, wanted, sorter=order)])


@dataclass(frozen=True)
class BestSet:
    """The methods on one source that may be the best at one number of labels, as trained in this run.

    `chosen` is the best of the `compared` ones on validation rows, None where not all were validated.
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
    said = _shared(scores, [read] * len(scores)) if len(scores) > 1 else [[]]
    chosen = best_of(scores)
    if not said[0] or chosen is None:
        return None
    if chosen.task == CLASSIFICATION:
        right = np.array([np.concatenate([one.right for one in of_method]) for of_method in said])
        among = may_be_best(right, np.concatenate([one.units for one in said[0]]))
    else:
        redrawn = [_redraw(chosen.task, chosen.measure.metric, *of_method) for of_method in said]
        compared = compare_redrawn(redrawn, scores.index(chosen))
        if compared is None:
            return None
        among = compared[1]
    named = chosen.name if is_validated(scores) else None
    methods = [score.name for score, best in zip(scores, among, strict=True) if best]
    return BestSet(board.source, shots, len(scores), named, methods)


@dataclass(frozen=True)
class Change:
    """A method whose measure differs between two runs on what both were tested on; `p` is adjusted for all methods.

    `metric` is what the measure is called.
    """

    source: str
    method: str
    shots: int | str
    before: float
    now: float
    difference: float
    p: float
    metric: str = ACCURACY


@dataclass(frozen=True)
class Against:
    """How many methods two runs share, which of these changed by more than noise, and which only one run has.

    `incomparable` methods have no test images of the same answers in both runs.
    """

    compared: int
    changed: Sequence[Change]
    only_before: Sequence[str]
    only_now: Sequence[str]
    incomparable: Sequence[str] = ()


def compare_runs(before: RunFolder, now: RunFolder) -> Against:
    """Compare all methods that two runs share on the test images that they share, by the metric of the run `now`."""
    old, new = _scores(before, now), _scores(now, before)
    tests = {key: compare_scores(new[key], old[key], now.predictions, before.predictions) for key in old if key in new}
    tested = [(key, paired) for key, paired in tests.items() if paired is not None]
    adjusted = holm([paired.p for _, paired in tested])
    changes = [
        Change(
            key[0],
            new[key].name,
            new[key].shots,
            paired.second,
            paired.first,
            paired.difference,
            p,
            paired.measure.metric,
        )
        for (key, paired), p in zip(tested, adjusted, strict=True)
        if p < LEVEL
    ]
    return Against(
        len(tested),
        sorted(changes, key=lambda change: -abs(change.difference)),
        [_text(key[0], score) for key, score in old.items() if key not in new],
        [_text(key[0], score) for key, score in new.items() if key not in old],
        [_text(key[0], new[key]) for key, paired in tests.items() if paired is None],
    )


def _scores(run: RunFolder, other: RunFolder) -> dict[tuple[str, str | None, str, Method, int | str], MethodScore]:
    """Return a run's scores by source, target, task, method and shots; names tell apart the methods of both runs."""
    found = leaderboards(run.results.values(), other.results.values())
    return {
        (board.source, score.first.result.target, score.task, *key): score
        for board in found
        for key, score in board.scores.items()
    }


def _text(source: str, score: MethodScore) -> str:
    task = "" if score.task == CLASSIFICATION else f", {score.task}"
    return f"{score.name}, shots {score.shots}, {source}{task}"
