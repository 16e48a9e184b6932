"""Freeze or fine-tune? The answer in sentences, from the results and their intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from pipeline.comparing.folder import FINETUNE, HEAD, RunInfo
from pipeline.comparing.methods import Leaderboard, MethodScore, is_validated
from pipeline.comparing.paired import LEVEL, BestSet, Paired, ReadPredictions, best_set, compare_scores
from pipeline.evaluation.intervals import CONFIDENCE
from pipeline.evaluation.wording import ACCURACY

FORECAST = (2, 4)
"""Multiples of the most labels at which accuracy is forecast; further ones were not checked."""

ExtractionTimes = Mapping[tuple[str, str], float]
"""Seconds that the extraction of all images takes, by source and backbone."""


@dataclass(frozen=True)
class Answer:
    """What the results on one source show, as a headline, sentences, and the few numbers that stand out.

    `frozen` and `tuned` are the best head and the best fine-tuning by validation accuracy. A fact is a label, a number,
    and what it is. `best_sets` are by number of labels.
    """

    headline: str
    sentences: list[str]
    frozen: MethodScore | None
    tuned: MethodScore | None
    facts: list[tuple[str, str, str]]
    best_sets: Mapping[int | str, BestSet]


def answer(board: Leaderboard, read: ReadPredictions, extraction: ExtractionTimes) -> Answer:
    """Say what the results on one source show; `read` returns what a model predicted, by the key of its result."""
    read = cache(read)
    sets = {shots: best_set(board, shots, read) for shots in board.shots}
    found = {shots: one for shots, one in sets.items() if one is not None}
    shared = [shots for shots in board.shots if board.at(shots, HEAD) and board.at(shots, FINETUNE)]
    at = shared[-1] if shared else board.shots[-1]
    frozen, tuned = board.best(HEAD, at), board.best(FINETUNE, at)
    if frozen and tuned:
        return _compare_both(board, frozen, tuned, read, extraction, found)
    best = frozen or tuned or next(iter(board.scores.values()))
    sentences = [_describe("The best frozen head" if frozen else "The best fine-tuning", best, board, extraction)]
    sentences += _say_best(found.get(best.shots))
    fewer = [shots for shots in board.shots[:-1] if (best.method, shots) in board.scores]
    if told := [
        f"{best.measure.text(board.scores[best.method, shots].value)} with {_labels(shots)}" for shots in fewer
    ]:
        sentences.append(f"With fewer labels it reaches {', '.join(told)}.")
    sentences += _forecast(board, [best])
    if {score.method.kind for score in board.scores.values()} == {HEAD, FINETUNE}:
        sentences.append("Freezing and fine-tuning have no number of labels in common at which to compare them.")
    elif frozen:
        sentences.append("Nothing was fine-tuned; add a [[finetune]] to the plan to see what that would gain.")
    return Answer(f"Best here: {best.name}", sentences, frozen, tuned, _facts(best, None, None), found)


def seconds(score: MethodScore, extraction: ExtractionTimes) -> float:
    """Return what a method costs: training, and one extraction of all images unless the whole network is trained."""
    return (score.mean("seconds") or 0.0) + _extraction_of(score, extraction)


def extraction_seconds(info: RunInfo) -> dict[tuple[str, str], float]:
    """Return how long the extraction of all images takes, by source and backbone, from what a run folder noted.

    If a backbone was extracted at several sizes or with several poolings, the longest extraction counts.
    """
    found: dict[tuple[str, str], float] = {}
    for cost in info.extractions.values():
        if cost.computed:
            key = cost.source, cost.backbone
            found[key] = max(cost.seconds / cost.computed * cost.rows, found.get(key, 0.0))
    return found


def duration(value: float) -> str:
    """Return seconds as text: 7.5 is ``7.5 s``, 300 is ``5 min``, 7200 is ``2.0 h``."""
    if value < 90:
        return f"{value:.1f} s" if value < 9.95 else f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 5400 else f"{value / 3600:.1f} h"


def _compare_both(
    board: Leaderboard,
    frozen: MethodScore,
    tuned: MethodScore,
    read: ReadPredictions,
    extraction: ExtractionTimes,
    best_sets: Mapping[int | str, BestSet],
) -> Answer:
    paired = compare_scores(tuned, frozen, read, confidence=_confidence(board, frozen.shots))
    costs = seconds(frozen, extraction), seconds(tuned, extraction)
    fewer = f"They are compared at {_labels(frozen.shots)}, the largest number that both were trained on."
    sentences = [fewer] if frozen.shots != board.shots[-1] else []
    sentences += [
        _describe("The best frozen head", frozen, board, extraction),
        _describe("The best fine-tuning", tuned, board, extraction),
    ]
    if paired is None and frozen.value != tuned.value:
        headline = "These test images cannot compare the two"
    else:
        headline = _headline(paired, costs)
    if paired is not None:
        sentences += _verdict(paired, max(len(frozen.by_seed), len(tuned.by_seed)))
    sentences += _say_best(best_sets.get(frozen.shots)) + _crossing(board, frozen, tuned, read)
    sentences += _forecast(board, [frozen, tuned]) + _overtaking(board, frozen, tuned, paired)
    return Answer(headline, sentences, frozen, tuned, _facts(frozen, tuned, paired), best_sets)


def _confidence(board: Leaderboard, shots: int | str) -> float:
    """Return the confidence for a head and a fine-tuning at this number of labels to be compared with.

    If both were chosen on validation, this is one comparison. Otherwise they were chosen on the test images themselves,
    and each head counts as compared with each fine-tuning (Bonferroni's correction).
    """
    chosen_on_test = [scores for kind in (HEAD, FINETUNE) if not is_validated(scores := board.at(shots, kind))]
    return 1 - LEVEL / math.prod(len(scores) for scores in chosen_on_test)


def _extraction_of(score: MethodScore, extraction: ExtractionTimes) -> float:
    whole = score.method.freeze == "none"
    return 0.0 if whole else extraction.get((score.first.source, score.method.backbone), 0.0)


def _headline(paired: Paired | None, costs: tuple[float, float]) -> str:
    """Say which to take; without a comparison both are equally good on test."""
    if paired is None or not paired.is_real:
        ratio = costs[1] / max(costs[0], 1e-9)
        if ratio >= 1.5:
            return f"Freeze: fine-tuning is not measurably better here, and takes {ratio:.0f} times as long"
        return "Either: these test images show no difference"
    low, high = sorted(abs(bound) for bound in (paired.low, paired.high))
    gain = paired.measure.range_text(low, high)
    of_what = "" if paired.measure.metric == ACCURACY else f" in {paired.measure.title}"
    return f"{'Fine-tune' if paired.low > 0 else 'Freeze'}: it is {gain}{of_what} here"


def _describe(what: str, score: MethodScore, board: Leaderboard, extraction: ExtractionTimes) -> str:
    rivals = board.at(score.shots, score.method.kind)
    how = "on validation" if is_validated(rivals) else f"by test {score.measure.title}, so expect worse on new images"
    chosen = f" (chosen from {len(rivals)} {how})" if len(rivals) > 1 else ""
    seeds = f" (mean of {len(score.by_seed)} seeds)" if len(score.by_seed) > 1 else ""
    grouped = f" in {score.n_groups} groups" if score.n_groups and score.n_groups < score.n_test else ""
    cost = duration(seconds(score, extraction))
    spent = f"{cost}, including the extraction of all images" if _extraction_of(score, extraction) else cost
    value, images = score.measure.text(score.value), f"{score.n_test} test images{grouped}"
    did = (
        f"classified {value} of {images} correctly"
        if score.measure.metric == ACCURACY
        else f"reached {score.measure.title} {value} on {images}"
    )
    interval = f", 95 % interval {score.measure.interval_text(score.interval)}" if score.interval else ""
    return f"{what}, {score.name}{chosen}, {did}{seeds}{interval}; it took {spent}."


def _verdict(paired: Paired, most_seeds: int) -> list[str]:
    """Say what the difference is, on which images and seeds, and what varies between seeds.

    `most_seeds` is the larger number of seeds of the two, not all of which they need to share.
    """
    images = f"{paired.n_images} test images"
    images += f" in {paired.n_groups} groups" if paired.n_groups < paired.n_images else ""
    seeds = f" and {paired.n_seeds} seed{'s' if paired.n_seeds > 1 else ''}" if most_seeds > 1 else ""
    measure = paired.measure
    did = "was right in" if measure.metric == ACCURACY else f"reached {measure.title}"
    sentence = (
        f"On the same {images}{seeds}, fine-tuning {did} {measure.text(paired.first)} and freezing "
        f"{'in ' if measure.metric == ACCURACY else ''}{measure.text(paired.second)}: fine-tuning is "
        f"{measure.range_text(paired.low, paired.high)} (95 % interval, {paired.test})"
    )
    if paired.is_real:
        sentences = [f"{sentence}, a real difference."]
    else:
        sentences = [f"{sentence}, so the difference may be chance."]
        if paired.smallest is not None:
            sentences.append(f"A difference of {100 * paired.smallest:.1f} points would be found here with 80 % power.")
    if paired.spread:
        drawn = "training images alone" if paired.shared else "training and test images"
        lowest, highest = map(measure.difference_text, paired.spread)
        sentences.append(f"The seeds draw {drawn}; their differences go from {lowest} to {highest}.")
    return sentences


def _say_best(found: BestSet | None, most: int = 5) -> list[str]:
    """Say which methods may be the best, and that the chosen one may not where that is so."""
    if found is None:
        return []
    n = len(found.methods)
    if n == found.compared:
        return [f"Any of the {n} methods may be the best: these test images cannot tell."]
    more = f" and {n - most} more" if n > most else ""
    named = f"{', '.join(found.methods[:most])}{more}"
    if n == 1:
        sentences = [f"With 95 % confidence, {named} is the best of the {found.compared} methods trained here."]
    else:
        sentences = [
            f"Any of these {n} of {found.compared} methods may be the best, and with 95 % confidence no other: {named}."
        ]
    if found.chosen is not None and found.chosen not in found.methods:
        sentences.append(f"So {found.chosen}, chosen on validation, is not the best.")
    return sentences


def _crossing(board: Leaderboard, frozen: MethodScore, tuned: MethodScore, read: ReadPredictions) -> list[str]:
    """Say how far the two are apart at each number of labels, by intervals that hold for all of these together."""
    scores = {
        shots: (board.scores[tuned.method, shots], board.scores[frozen.method, shots])
        for shots in board.shots
        if (frozen.method, shots) in board.scores and (tuned.method, shots) in board.scores
    }
    if len(scores) < 2:
        return []
    confidence = 1 - (1 - _confidence(board, frozen.shots)) / len(scores)
    found = {shots: compare_scores(*pair, read, confidence=confidence) for shots, pair in scores.items()}
    known = {shots: paired for shots, paired in found.items() if paired is not None}
    told = [
        f"{paired.measure.range_text(paired.low, paired.high)} with {_labels(shots)}" for shots, paired in known.items()
    ]
    return [f"By number of labels, fine-tuning is {'; '.join(told)} (95 % intervals for all together)."] if told else []


def _forecast(board: Leaderboard, scores: Sequence[MethodScore]) -> list[str]:
    """Say how accurate each method would be with more labels than the most it has had."""
    told = []
    for score in scores:
        curve = board.curve(score.method)
        if curve is not None:
            most = curve.labels[-1]
            kind = "freezing" if score.method.is_frozen else "fine-tuning"
            expected = [
                f"{100 * low:.0f}–{100 * high:.0f} % with {times * most:.0f} labels a class"
                for times in FORECAST
                for low, high in [curve.interval(times * most)]
            ]
            told.append(f"{kind} would be right in {' and '.join(expected)}")
    return [f"If the curves over labels go on, {'; '.join(told)} (95 % intervals of the forecast)."] if told else []


def _overtaking(board: Leaderboard, frozen: MethodScore, tuned: MethodScore, paired: Paired | None) -> list[str]:
    """Say whether fine-tuning would overtake the frozen head within the labels that are forecast."""
    curves = board.curve(frozen.method), board.curve(tuned.method)
    if curves[0] is None or curves[1] is None or paired is None or paired.low > 0:
        return []
    most = max(curve.labels[-1] for curve in curves if curve is not None)
    labels = np.geomspace(most, FORECAST[-1] * most, 17)
    ahead = (curves[1].draws(labels.tolist(), seed=1) > curves[0].draws(labels.tolist())).mean(axis=0)
    if ahead[-1] >= CONFIDENCE:
        first, last = (labels[np.argmax(ahead >= share)] for share in (LEVEL, CONFIDENCE))
        return [f"Fine-tuning would overtake between {first:.0f} and {last:.0f} labels a class."]
    if ahead[-1] <= LEVEL:
        return [f"Fine-tuning would not overtake up to {labels[-1]:.0f} labels a class."]
    return [f"Whether fine-tuning would overtake up to {labels[-1]:.0f} labels a class cannot be told from the curves."]


def _labels(shots: int | str) -> str:
    return "all labels" if shots == "all" else f"{shots} label{'s' if shots != 1 else ''} a class"


def _facts(first: MethodScore, second: MethodScore | None, paired: Paired | None) -> list[tuple[str, str, str]]:
    """Return the `Answer.facts` of one or two methods."""
    found = []
    for score in (first, second):
        if score is not None:
            kind = "frozen" if score.method.is_frozen else "fine-tuned"
            interval = f"; {score.measure.interval_text(score.interval)}" if score.interval else ""
            found.append((kind, score.measure.text(score.value), f"{score.name}{interval.removesuffix(' %')}"))
    if paired is not None:
        text, verdict = paired.measure.difference_text, "real" if paired.is_real else "may be chance"
        what = f"difference, {paired.measure.unit or paired.measure.title}"
        interval = f"95 % interval {text(paired.low)} to {text(paired.high)}"
        found.append((what, text(paired.difference), f"{interval}; {verdict}"))
    return found
