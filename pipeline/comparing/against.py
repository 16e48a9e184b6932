"""Two runs side by side: what changed beyond noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.comparing.folder import RunFolder
from pipeline.comparing.methods import Score, boards
from pipeline.comparing.paired import LEVEL, compare_scores
from pipeline.evaluation.comparisons import holm


@dataclass(frozen=True)
class Change:
    """One method in both runs.

    Parameters
    ----------
    source, method : str
    shots : int or "all"
    before, now : float
        Mean accuracies.
    difference : float
        Now minus before, on the seeds or images that both have.
    p : float
        Of a paired test, adjusted for the number of methods compared.
    """

    source: str
    method: str
    shots: int | str
    before: float
    now: float
    difference: float
    p: float


@dataclass(frozen=True)
class Against:
    """Another run compared with this one.

    Parameters
    ----------
    compared : int
        Methods that both runs have.
    changed : sequence of Change
        Those that differ beyond noise, the largest difference first.
    only_before, only_now : sequence of str
        Methods that one run alone has.
    """

    compared: int
    changed: Sequence[Change]
    only_before: Sequence[str]
    only_now: Sequence[str]


def compare_runs(before: RunFolder, now: RunFolder) -> Against:
    """Compare all methods that two runs share, image by image."""
    old, new = _scores(before, now), _scores(now, before)
    tested = []
    for place in old:
        if place in new:
            paired = compare_scores(new[place], old[place], now.judged, before.judged)
            if paired is not None:
                tested.append((place, paired))
    adjusted = holm([paired.p for _, paired in tested])
    changes = [
        Change(*place, old[place].accuracy, new[place].accuracy, paired.difference, p)
        for (place, paired), p in zip(tested, adjusted, strict=True)
        if p < LEVEL
    ]
    return Against(
        len(tested),
        sorted(changes, key=lambda change: -abs(change.difference)),
        [_text(place) for place in old if place not in new],
        [_text(place) for place in new if place not in old],
    )


def _scores(run: RunFolder, other: RunFolder) -> dict[tuple[str, str, int | str], Score]:
    """Return a run's scores by source, method and shots, named as they are beside another run."""
    found = boards(run.records.values(), other.records.values())
    return {(board.source, *place): score for board in found for place, score in board.scores.items()}


def _text(place: tuple[str, str, int | str]) -> str:
    source, method, shots = place
    return f"{method}, shots {shots}, {source}"
