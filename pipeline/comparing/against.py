"""Two runs compared: which methods changed by more than noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.comparing.folder import RunFolder
from pipeline.comparing.methods import Method, MethodScore, leaderboards
from pipeline.comparing.paired import LEVEL, compare_scores
from pipeline.evaluation.comparisons import holm


@dataclass(frozen=True)
class Change:
    """A method whose accuracy differs between two runs, on what both were tested on; `p` is adjusted for all methods."""

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
