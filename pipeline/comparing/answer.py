"""Freeze or fine-tune? The answer in sentences, from the results and their intervals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.comparing.folder import FINETUNE, HEAD, RunInfo
from pipeline.comparing.methods import Leaderboard, MethodScore, best_of, is_validated
from pipeline.comparing.paired import LEVEL, Paired, ReadPredictions, compare_scores

ExtractionTimes = Mapping[tuple[str, str], float]
"""Seconds that the extraction of all images takes, by source and backbone."""


@dataclass(frozen=True)
class Answer:
    """What the results on one source show, as a headline, sentences, and the few numbers that stand out.

    `frozen` and `tuned` are the best head and the best fine-tuning by validation accuracy. A fact is a label, a number,
    and what it is.
    """

    headline: str
    sentences: list[str]
    frozen: MethodScore | None
    tuned: MethodScore | None
    facts: list[tuple[str, str, str]]


def answer(board: Leaderboard, read: ReadPredictions, extraction: ExtractionTimes) -> Answer:
    """Say what the results on one source show; `read` returns what a model predicted, by the key of its result."""
    shared = [shots for shots in board.shots if board.at(shots, HEAD) and board.at(shots, FINETUNE)]
    at = shared[-1] if shared else board.shots[-1]
    frozen, tuned = board.best(HEAD, at), board.best(FINETUNE, at)
    if frozen and tuned:
        return _compare_both(board, frozen, tuned, read, extraction)
    best = frozen or tuned or next(iter(board.scores.values()))
    sentences = [_describe("The best frozen head" if frozen else "The best fine-tuning", best, board, extraction)]
    rival = _rival(board, best)
    paired = compare_scores(rival, best, read) if rival else None
    if rival and paired:
        sentences.append(f"The runner-up is {rival.name} with {percent(rival.accuracy)}: {_verdict(paired)}.")
    fewer = [shots for shots in board.shots[:-1] if (best.method, shots) in board.scores]
    if told := [f"{percent(board.scores[best.method, shots].accuracy)} with {_labels(shots)}" for shots in fewer]:
        sentences.append(f"With fewer labels it reaches {', '.join(told)}.")
    if {score.method.kind for score in board.scores.values()} == {HEAD, FINETUNE}:
        sentences.append("Freezing and fine-tuning have no number of labels in common at which to compare them.")
    elif frozen:
        sentences.append("Nothing was fine-tuned; add a [[finetune]] to the plan to see what that would gain.")
    return Answer(f"Best here: {best.name}", sentences, frozen, tuned, _facts(best, rival, paired))


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


def percent(share: float) -> str:
    """Return a share as text: 0.953 is ``95.3 %``."""
    return f"{100 * share:.1f} %"


def points(difference: float) -> str:
    """Return a difference of shares in percentage points, with its sign."""
    text = f"{100 * difference:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "−")


def duration(value: float) -> str:
    """Return seconds as text: 7.5 is ``7.5 s``, 300 is ``5 min``, 7200 is ``2.0 h``."""
    if value < 90:
        return f"{value:.1f} s" if value < 9.95 else f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 5400 else f"{value / 3600:.1f} h"


def p_text(p: float) -> str:
    """Return a p-value with as many digits as carry meaning."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def _compare_both(
    board: Leaderboard, frozen: MethodScore, tuned: MethodScore, read: ReadPredictions, extraction: ExtractionTimes
) -> Answer:
    paired = compare_scores(tuned, frozen, read)
    costs = seconds(frozen, extraction), seconds(tuned, extraction)
    fewer = f"They are compared at {_labels(frozen.shots)}, the largest number that both were trained on."
    sentences = [fewer] if frozen.shots != board.shots[-1] else []
    sentences += [
        _describe("The best frozen head", frozen, board, extraction),
        _describe("The best fine-tuning", tuned, board, extraction),
    ]
    if paired is None:
        headline = "The two cannot be compared: they share no test images"
    else:
        sentences.append(f"Fine-tuning against freezing: {_verdict(paired)}.")
        headline = _headline(paired, costs)
    sentences += _crossing(board, frozen, tuned)
    return Answer(headline, sentences, frozen, tuned, _facts(frozen, tuned, paired))


def _extraction_of(score: MethodScore, extraction: ExtractionTimes) -> float:
    whole = score.method.freeze == "none"
    return 0.0 if whole else extraction.get((score.first.source, score.method.backbone), 0.0)


def _headline(paired: Paired, costs: tuple[float, float]) -> str:
    if paired.p >= LEVEL:
        ratio = costs[1] / max(costs[0], 1e-9)
        if ratio >= 1.5:
            return f"Freeze: fine-tuning is not measurably better here, and takes {ratio:.0f} times as long"
        return "Either: these test images show no difference"
    gap = f"{abs(100 * paired.difference):.1f} points"
    return f"Fine-tune: it is {gap} better here" if paired.difference > 0 else f"Freeze: it is {gap} better here"


def _describe(what: str, score: MethodScore, board: Leaderboard, extraction: ExtractionTimes) -> str:
    low, high = score.interval
    rivals = board.at(score.shots, score.method.kind)
    how = "by validation accuracy" if is_validated(rivals) else "by test accuracy, so this is slightly optimistic"
    chosen = f" (chosen from {len(rivals)} {how})" if len(rivals) > 1 else ""
    seeds = f" (mean of {len(score.by_seed)} seeds)" if len(score.by_seed) > 1 else ""
    cost = duration(seconds(score, extraction))
    spent = f"{cost}, including the extraction of all images" if _extraction_of(score, extraction) else cost
    return (
        f"{what}, {score.name}{chosen}, classified {percent(score.accuracy)} of {score.n_test} test images "
        f"correctly{seeds}, 95 % interval {100 * low:.1f}–{percent(high)}; it took {spent}."
    )


def _verdict(paired: Paired) -> str:
    gap = f"{points(paired.difference)} points"
    if paired.p < LEVEL:
        return f"{gap}, a real difference ({paired.test}, {p_text(paired.p)})"
    return f"{gap}, which may be chance ({paired.test}, {p_text(paired.p)})"


def _rival(board: Leaderboard, best: MethodScore) -> MethodScore | None:
    """Return the best method of another backbone, head or thaw line; another layer is hardly a rival."""

    def kin(score: MethodScore) -> tuple[str, str, str]:
        return score.method.backbone, score.method.head, score.method.freeze

    return best_of([score for score in board.at(best.shots) if kin(score) != kin(best)])


def _crossing(board: Leaderboard, frozen: MethodScore, tuned: MethodScore) -> list[str]:
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
        return [f"{fewest}; the frozen head is ahead or level at every number of labels."]
    turn = ahead.index(True) if not ahead[0] else ahead.index(False)
    if any(now != ahead[turn] for now in ahead[turn:]):
        return [f"{fewest}; with more labels the lead changes more than once, as it would by chance."]
    leader = "fine-tuning" if ahead[turn] else "the frozen head"
    return [f"{fewest}; from {_labels(pairs[turn][0])} on {leader} is ahead."]


def _labels(shots: int | str) -> str:
    return "all labels" if shots == "all" else f"{shots} label{'s' if shots != 1 else ''} a class"


def _facts(first: MethodScore, second: MethodScore | None, paired: Paired | None) -> list[tuple[str, str, str]]:
    """Return the `Answer.facts` of one or two methods."""
    found = []
    for score in (first, second):
        if score is not None:
            low, high = score.interval
            kind = "frozen" if score.method.is_frozen else "fine-tuned"
            found.append((kind, percent(score.accuracy), f"{score.name}; {100 * low:.1f}–{100 * high:.1f}"))
    if paired is not None:
        verdict = "real" if paired.p < LEVEL else "may be chance"
        found.append(("difference, points", points(paired.difference), f"{verdict}, {p_text(paired.p)}"))
    return found
