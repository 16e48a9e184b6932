"""Terminal tables of the diagnostics."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from rich.table import Table

from pipeline.reporting.terminal.tables import rows_table
from pipeline.results import Agreement, DriftResult, LayerScore

LEVEL = 0.05
"""Up to this p-value, two sets are said to differ."""
_SCORES = {"logme": "LogME", "h_score": "H-score", "leep": "LEEP"}


def rank_table(ranking: Sequence[LayerScore]) -> Table:
    """One row for each layer, the best first; columns that are empty or say the same everywhere are left out."""
    columns = {
        "": [str(rank) for rank in range(1, len(ranking) + 1)],
        "backbone": [score.backbone for score in ranking],
        "pool": [score.pool for score in ranking],
        "layer": [score.layer for score in ranking],
        "features": [str(score.dim) for score in ranking],
        "LogME": [f"{score.logme:.3f}" for score in ranking],
        "H-score": [f"{score.h_score:.2f}" for score in ranking],
        "LEEP": ["" if score.leep is None else f"{score.leep:.3f}" for score in ranking],
        "accuracy": ["" if score.accuracy is None else f"{score.accuracy:.3f}" for score in ranking],
    }
    needless = [name for name in ("backbone", "pool") if len(set(columns[name])) == 1]
    needless += [name for name in ("LEEP", "accuracy") if not any(columns[name])]
    shown = {name: cells for name, cells in columns.items() if name not in needless}
    return rows_table(tuple(shown), list(zip(*shown.values(), strict=True)))


def agreement_lines(agreement: Sequence[Agreement]) -> list[str]:
    """Say how well the order by each score agrees with the order by test accuracy."""
    return [
        f"{_SCORES[found.score]} against test accuracy over {found.layers} layers: "
        f"Kendall's tau {found.kendall_tau:.2f}, Spearman's rho {found.spearman_rho:.2f}"
        for found in agreement
    ]


def drift_lines(result: DriftResult) -> list[str]:
    """Say whether the two sets differ, and how many images were compared."""
    shared = f"; {result.shared} are in both sets and left out" if result.shared else ""
    verdict = (
        "the two sets differ"
        if result.p_value <= LEVEL
        else "no sign that the two sets differ; the images below look no more foreign than by chance"
    )
    return [
        f"{result.images[0]} and {result.images[1]} images{shared}; {result.compared} of each set compared on "
        f"{result.layer}",
        f"a classifier tells held-out images of the two sets apart with an accuracy of {result.accuracy:.3f} "
        f"(0.5 is a guess), p = {result.p_value:.3g}: {verdict}",
    ]


def foreign_table(result: DriftResult) -> Table:
    """The images that look most foreign, a column for each set."""
    pairs = zip_longest(result.foreign_in_first, result.foreign_in_second)
    rows = [tuple("" if image is None else f"{image.uri} ({image.score:.2f})" for image in pair) for pair in pairs]
    return rows_table(("most foreign in the first", "most foreign in the second"), rows)
