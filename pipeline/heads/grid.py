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
from pipeline.evaluation.folds import cross_splits
from pipeline.evaluation.rows import Layer, require_finite
from pipeline.evaluation.splits import Splits, make_splits
from pipeline.heads.registry import Head
from pipeline.heads.solvers.device import run_one_by_one
from pipeline.heads.trial import Outcome, Prepared, prepare, run_trial
from pipeline.results import Progress

MOST_CELLS = 1 << 27
"""Weights of a linear head, or probabilities of test rows: 1 GiB of float64."""


@dataclass(frozen=True, eq=False)
class Cut:
    """One layer under one split; of a cross-validation there are as many in a row as folds."""

    layer: Layer
    seed: int
    shots: int | str
    splits: Splits


def cut_layers(
    layers: Sequence[Layer], seeds: Sequence[int], shots: Sequence[int | str], cv: int | None, *, drop_leaks: bool
) -> list[Cut]:
    """Split each layer's rows; layers of the same files share their splits.

    Parameters
    ----------
    layers : sequence of Layer
    seeds, shots : sequences
        Crossed with the layers.
    cv : int, optional
        Number of folds: so many cuts for each layer, seed and number of shots.
    drop_leaks : bool
        Whether test rows that repeat training rows are left out.
    """
    made: dict[tuple[int, int, int | str], list[Splits]] = {}
    cuts = []
    for layer, seed, count in itertools.product(layers, seeds, shots):
        table = layer.table
        key = (id(table), seed, count)
        if key not in made:
            columns = (table.labels, table.splits, table.groups, table.digests)
            if cv is None:
                uris = table.uris.tolist()
                made[key] = [make_splits(*columns, seed, count, table.classes, uris, drop_leaks=drop_leaks)]
            else:
                made[key] = cross_splits(*columns, seed, cv, count, table.classes)
        cuts += [Cut(layer, seed, count, splits) for splits in made[key]]
    return cuts


def check_trials(trials: Sequence[tuple[Cut, Head]], *, balanced: bool) -> None:
    """Refuse what rows and heads do not allow, before anything is trained.

    Raises
    ------
    FitError
        If a layer has NaN or infinite features, a head is given more rows or classes than it can take, or classes are
        to be balanced for a head that cannot.
    """
    for cut, head in trials:
        rows, most = len(cut.splits.train) + len(cut.splits.val), head.family.most_rows
        if most is not None and rows > most:
            raise FitError(
                f"{head.name} compares all pairs of at most {most} training rows, got {rows}; "
                "take linear_svm, or fewer rows with --shots"
            )
        if balanced and not head.family.weighted:
            raise FitError(f"{head.name} cannot weigh its training rows; leave it or --balanced out")
        classes, tested = len(cut.layer.table.classes), len(cut.splits.test)
        cells = classes * max(cut.layer.dim if head.family.linear else 0, tested if head.family.probabilities else 0)
        if cells > MOST_CELLS:
            raise FitError(
                f"{head.name} for {classes} classes would need a table of {cells * 8 / 2**30:.1f} GiB; "
                "take centroid, or give coarser labels"
            )
    for layer in dict.fromkeys(cut.layer for cut, _ in trials):
        require_finite(layer)


def run_trials(
    trials: Sequence[tuple[Cut, Head]],
    jobs: int | None,
    progress: Progress | None,
    *,
    balanced: bool,
    keep: bool,
    finished: Callable[[int, Outcome], None],
) -> Any:
    """Run all trials: first those of a device one by one, then those of the CPU several at a time.

    Returns the model to prefer, see `preference`, if models were to be kept; otherwise None.

    Parameters
    ----------
    trials : sequence of (Cut, Head)
    jobs : int, optional
        Processes; one a core by default, and never more than there are trials.
    progress : callable, optional
        Called as ``progress(done, total, "fit")``.
    balanced : bool
        Whether every class counts alike.
    keep : bool
        Whether to keep the best model.
    finished : callable
        Called as ``finished(place, outcome)`` as soon as the trial at `place` is done, without its model.
    """
    best: tuple[float, float, int] | None = None
    model = None
    first: dict[Cut, int] = {}
    for place, (cut, _) in enumerate(trials):
        first.setdefault(cut, place)
    places = sorted(range(len(trials)), key=lambda place: first[trials[place][0]])  # cut by cut: heads share rows
    elsewhere = [place for place in places if trials[place][1].family.device is not None]
    here = [place for place in places if trials[place][1].family.device is None]
    workers = min(jobs or joblib.cpu_count(), len(here)) or 1
    # one trial prepared ahead of the workers keeps them busy, and memory within what they use
    parallel = joblib.Parallel(workers, return_as="generator", batch_size=1, pre_dispatch="n_jobs + 1")
    with threadpool_limits(1 if workers > 1 else None):
        finishing = itertools.chain.from_iterable(
            run(_tasks([trials[place] for place in part], balanced=balanced, keep=keep))
            for run, part in ((run_one_by_one, elsewhere), (parallel, here))
        )
        for done, (place, outcome) in enumerate(zip(elsewhere + here, finishing, strict=True)):
            rank = preference(trials[place][0].shots, outcome.choice.score, place)
            if best is None or rank > best:
                best, model = rank, outcome.pipeline
            finished(place, replace(outcome, pipeline=None))
            if progress is not None:
                progress(done + 1, len(trials), "fit")
    return model


def preference(shots: int | str, score: float | None, place: int) -> tuple[float, float, int]:
    """Return what orders models, the largest to be kept: trained on most shots, validated best, first in order.

    Few shots are validated on few rows, where all may be right by chance: only scores of equal shots are compared.

    Parameters
    ----------
    shots : int or "all"
    score : float or None
        Validation accuracy; None or NaN, where nothing was validated, comes last.
    place : int
    """
    return (math.inf if shots == "all" else float(shots), -1.0 if score is None or math.isnan(score) else score, -place)


def _tasks(trials: Sequence[tuple[Cut, Head]], *, balanced: bool, keep: bool) -> Iterator[Any]:
    """Prepare rows when a worker is about to need them, once for all heads of a cut that want the same."""
    prepared: dict[tuple[str, bool], Prepared] = {}
    current = None
    for cut, head in trials:
        if cut is not current:
            prepared, current = {}, cut
        table = cut.layer.table
        scaling, rotated = head.scaling, head.family.linear and cut.layer.dim > len(cut.splits.train)
        if (scaling, rotated) not in prepared:
            prepared[scaling, rotated] = prepare(
                cut.layer.features, table.labels, cut.splits, scaling, rotated=rotated, seed=cut.seed
            )
        rows = prepared[scaling, rotated]
        yield joblib.delayed(run_trial)(head, rows, len(table.classes), balanced=balanced, keep=keep)
