"""Cross layers, splits and heads, and run what comes of it in parallel."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import joblib
from threadpoolctl import threadpool_limits

from pipeline.errors import FitError
from pipeline.evaluation.splits import Splits, make_splits
from pipeline.heads.registry import Head
from pipeline.heads.trial import Outcome, Prepared, prepare, run_trial
from pipeline.selection import Layer, require_finite

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, eq=False)
class Cut:
    """One layer under one split."""

    layer: Layer
    seed: int
    shots: int | str
    splits: Splits


def cut_layers(layers: Sequence[Layer], seeds: Sequence[int], shots: Sequence[int | str]) -> list[Cut]:
    """Split each layer's rows; layers of the same files share their splits."""
    made: dict[tuple[int, int, int | str], Splits] = {}
    cuts = []
    for layer, seed, count in itertools.product(layers, seeds, shots):
        table = layer.table
        key = (id(table), seed, count)
        if key not in made:
            columns = (table.labels, table.splits, table.groups, table.digests)
            made[key] = make_splits(*columns, seed, count, table.classes, table.uris)
        cuts.append(Cut(layer, seed, count, made[key]))
    return cuts


def check_rows(layers: Sequence[Layer], cuts: Sequence[Cut], heads: Sequence[Head]) -> None:
    """Refuse, before the first fit, rows that a head cannot take: too many of them, or not finite."""
    largest = max(len(cut.splits.train) + len(cut.splits.val) for cut in cuts)
    for head in heads:
        most = head.family.most_rows
        if most is not None and largest > most:
            raise FitError(
                f"{head.name} compares all pairs of at most {most} training rows, got {largest}; "
                "take linear_svm, or fewer rows with --shots"
            )
    for layer in layers:
        require_finite(layer)


def run_trials(
    cuts: Sequence[Cut],
    heads: Sequence[Head],
    places: Sequence[int],
    jobs: int | None,
    progress: Progress | None,
    *,
    keep: bool,
) -> tuple[list[Outcome], int, Any]:
    """Return the outcomes in the order of the report, without their models, the best one's place, and its model."""
    outcomes: dict[int, Outcome] = {}
    best, pipeline = (-math.inf, 0), None
    workers = min(jobs or joblib.cpu_count(), len(places))
    # one trial prepared ahead of the workers keeps them busy, and memory within what they use
    parallel = joblib.Parallel(workers, return_as="generator", batch_size=1, pre_dispatch="n_jobs + 1")
    with threadpool_limits(1 if workers > 1 else None):
        for place, outcome in zip(places, parallel(_trials(cuts, heads, keep=keep)), strict=True):
            if (rank(outcome), -place) > best:
                best, pipeline = (rank(outcome), -place), outcome.pipeline
            outcomes[place] = replace(outcome, pipeline=None)
            if progress is not None:
                progress(len(outcomes), len(places), "fit")
    return [outcomes[place] for place in range(len(places))], -best[1], pipeline


def _trials(cuts: Sequence[Cut], heads: Sequence[Head], *, keep: bool) -> Iterator[Any]:
    for cut in cuts:
        table = cut.layer.table
        shared: dict[tuple[str, bool], Prepared] = {}
        for head in heads:
            key = (head.scaling, head.family.linear and cut.layer.dim > len(cut.splits.train))
            if key not in shared:
                scaling, rotated = key
                shared[key] = prepare(
                    cut.layer.features, table.labels, cut.splits, scaling, rotated=rotated, seed=cut.seed
                )
            yield joblib.delayed(run_trial)(head, shared[key], len(table.classes), keep=keep)


def rank(outcome: Outcome) -> float:
    """Return the validation accuracy; parameters that were not validated rank last."""
    return -1.0 if math.isnan(outcome.choice.score) else outcome.choice.score
