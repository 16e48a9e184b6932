"""Freeze or fine-tune? The answer in sentences, each from the results and their intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pipeline.comparing.folder import Record
from pipeline.comparing.methods import FINETUNE, HEAD, Board, Score, best_of, is_validated
from pipeline.comparing.paired import LEVEL, Paired, compare_scores
from pipeline.evaluation.predictions import Predictions

Judge = Callable[[str], Predictions]
Costs = Mapping[tuple[str, str], float]
"""Seconds that the extraction of all images takes, by source and backbone."""


@dataclass(frozen=True)
class Answer:
    """What one board shows.

    Parameters
    ----------
    headline : str
        A few words.
    sentences : list of str
    frozen, tuned, runner_up : Score or None
        The best of each kind by validation, and, where nothing was fine-tuned, the best frozen one of another backbone
        or head.
    paired : Paired or None
        Of `tuned` (or the runner-up) against `frozen`: how much better, and whether that is real.
    facts : list of (str, str, str)
        The few numbers that stand out: label, number, what it is.
    """

    headline: str
    sentences: list[str]
    frozen: Score | None
    tuned: Score | None
    runner_up: Score | None
    paired: Paired | None
    facts: list[tuple[str, str, str]]


def answer(board: Board, judged: Judge, extraction: Costs) -> Answer:
    """Say what a board shows.

    Parameters
    ----------
    board : Board
    judged : callable
        What a model said about its test images, by key.
    extraction : dict of (str, str) to float
        Seconds it takes to extract all images, by source and backbone.
    """
    shared = [shots for shots in board.shots if board.at(shots, HEAD) and board.at(shots, FINETUNE)]
    at = shared[-1] if shared else board.shots[-1]
    frozen, tuned = board.best(HEAD, at), board.best(FINETUNE, at)
    if frozen and tuned:
        return _both(board, frozen, tuned, judged, extraction)
    best = frozen or tuned or next(iter(board.scores.values()))
    both = {score.first["kind"] for score in board.scores.values()} == {HEAD, FINETUNE}
    sentences = [_praise("The best frozen head" if frozen else "The best fine-tuning", best, board, extraction)]
    rival = _rival(board, best)
    paired = compare_scores(rival, best, judged) if rival else None
    if rival and paired:
        sentences.append(f"Next comes {rival.method} with {percent(rival.accuracy)}: {_doubt(paired)}.")
    sentences += _labels_alone(board, best)
    if both:
        sentences.append("Freezing and fine-tuning have no number of labels in common at which to compare them.")
    elif frozen:
        sentences.append("No fine-tuning stands beside it; a [[finetune]] in the plan would tell what that adds.")
    return Answer(f"Best here: {best.method}", sentences, frozen, tuned, rival, paired, _facts(best, rival, paired))


def seconds(score: Score, extraction: Costs) -> float:
    """Return what a method costs: its training, and, where something is frozen, one run of that over all images."""
    return (score.mean("seconds") or 0.0) + _extraction_of(score, extraction)


def percent(share: float) -> str:
    """Return a share as text: 0.953 is ``95.3 %``."""
    return f"{100 * share:.1f} %"


def points(difference: float) -> str:
    """Return a difference of shares in points, with its sign."""
    text = f"{100 * difference:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "−")


def duration(value: float) -> str:
    """Return seconds as a reader would say them."""
    if value < 90:
        return f"{value:.1f} s" if value < 9.95 else f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 5400 else f"{value / 3600:.1f} h"


def p_text(p: float) -> str:
    """Return a p-value with as many digits as carry meaning."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def _both(board: Board, frozen: Score, tuned: Score, judged: Judge, extraction: Costs) -> Answer:
    paired = compare_scores(tuned, frozen, judged)
    costs = seconds(frozen, extraction), seconds(tuned, extraction)
    few = f"They are compared at {_labels(frozen.shots)}, the most that both were given."
    sentences = [few] if frozen.shots != board.shots[-1] else []
    sentences += [
        _praise("The best frozen head", frozen, board, extraction),
        _praise("The best fine-tuning", tuned, board, extraction),
    ]
    if paired is None:
        headline = "The two were not tried on the same images"
    else:
        sentences.append(f"Fine-tuning against freezing: {_doubt(paired)}.")
        headline = _headline(paired, costs)
    sentences += _crossing(board, frozen, tuned)
    return Answer(headline, sentences, frozen, tuned, None, paired, _facts(frozen, tuned, paired))


def _extraction_of(score: Score, extraction: Costs) -> float:
    first = score.first
    return 0.0 if first.get("freeze") == "none" else extraction.get((first["source"], first["backbone"]), 0.0)


def _headline(paired: Paired, costs: tuple[float, float]) -> str:
    if paired.p >= LEVEL:
        ratio = costs[1] / max(costs[0], 1e-9)
        if ratio >= 1.5:
            return f"Freeze: fine-tuning is not measurably better here, and takes {ratio:.0f} times as long"
        return "Either: no difference that these test images could show"
    gap = f"{abs(100 * paired.difference):.1f} points"
    return f"Fine-tune: it is {gap} better here" if paired.difference > 0 else f"Freeze: it is {gap} better here"


def _praise(what: str, score: Score, board: Board, extraction: Costs) -> str:
    low, high = score.interval
    rivals = board.at(score.shots, score.first["kind"])
    how = "by validation accuracy" if is_validated(rivals) else "by test accuracy, which flatters it a little"
    chosen = f" (chosen from {len(rivals)} {how})" if len(rivals) > 1 else ""
    seeds = f" (mean of {len(score.records)} seeds)" if len(score.records) > 1 else ""
    cost = duration(seconds(score, extraction))
    spent = f"{cost} of training"
    if _extraction_of(score, extraction):
        spent = f"{cost}, the extraction of all images included"
    return (
        f"{what}, {score.method}{chosen}, got {percent(score.accuracy)} of {score.first['n_test']} test images "
        f"right{seeds}, 95 % interval {100 * low:.1f}–{percent(high)}, for {spent}."
    )


def _doubt(paired: Paired) -> str:
    gap = f"{points(paired.difference)} points"
    if paired.p < LEVEL:
        return f"{gap}, a real difference ({paired.test}, {p_text(paired.p)})"
    return f"{gap}, which cannot be told from chance ({paired.test}, {p_text(paired.p)})"


def _rival(board: Board, best: Score) -> Score | None:
    """Return the best of another backbone or head; another layer of the same is hardly a rival."""
    own = (best.first["backbone"], best.first["head"], best.first.get("freeze"))
    others = [
        score
        for score in board.at(best.shots)
        if (score.first["backbone"], score.first["head"], score.first.get("freeze")) != own
    ]
    return best_of(others)


def _crossing(board: Board, frozen: Score, tuned: Score) -> list[str]:
    """Say from how many labels a class on fine-tuning is ahead."""
    pairs = [
        (shots, board.scores[frozen.method, shots].accuracy, board.scores[tuned.method, shots].accuracy)
        for shots in board.shots
        if (frozen.method, shots) in board.scores and (tuned.method, shots) in board.scores
    ]
    if len(pairs) < 2:
        return []
    ahead = [tuned_accuracy > frozen_accuracy for _, frozen_accuracy, tuned_accuracy in pairs]
    fewest = f"With {_labels(pairs[0][0])} it is {percent(pairs[0][1])} frozen and {percent(pairs[0][2])} fine-tuned"
    if all(ahead):
        return [f"{fewest}; fine-tuning is ahead at every number of labels."]
    if not any(ahead):
        return [f"{fewest}; the frozen head is ahead, or level, at every number of labels."]
    turn = ahead.index(True) if not ahead[0] else ahead.index(False)
    if any(now != ahead[turn] for now in ahead[turn:]):
        return [f"{fewest}; after that the lead changes more than once, which is what noise looks like."]
    leader = "fine-tuning" if ahead[turn] else "the frozen head"
    return [f"{fewest}; from {_labels(pairs[turn][0])} on {leader} is ahead."]


def _labels_alone(board: Board, best: Score) -> list[str]:
    few = [shots for shots in board.shots[:-1] if (best.method, shots) in board.scores]
    told = [f"{percent(board.scores[best.method, shots].accuracy)} with {_labels(shots)}" for shots in few]
    return [f"With fewer labels it reaches {', '.join(told)}."] if told else []


def _labels(shots: int | str) -> str:
    return "all labels" if shots == "all" else f"{shots} label{'s' if shots != 1 else ''} a class"


def _facts(first: Score, second: Score | None, paired: Paired | None) -> list[tuple[str, str, str]]:
    """Return the `Answer.facts` of one or two methods."""
    found = []
    for score in (first, second):
        if score is not None:
            low, high = score.interval
            kind = "frozen" if score.first["kind"] == HEAD else "fine-tuned"
            found.append((kind, percent(score.accuracy), f"{score.method}; {100 * low:.1f}–{100 * high:.1f}"))
    if paired is not None:
        verdict = "real" if paired.p < LEVEL else "not told from chance"
        found.append(("difference, points", points(paired.difference), f"{verdict}, {p_text(paired.p)}"))
    return found


def extraction_seconds(run: Record) -> dict[tuple[str, str], float]:
    """Return how long the extraction of all images takes by source and backbone, from what a run noted.

    Of several sizes or poolings, each of which is an extraction, the longest counts.
    """
    found: dict[tuple[str, str], float] = {}
    for entry in run.get("extractions", {}).values():
        if entry["computed"]:
            whole = entry["seconds"] / entry["computed"] * entry["rows"]
            place = entry["source"], entry["backbone"]
            found[place] = max(whole, found.get(place, 0.0))
    return found
