"""Stage 2: train heads on cached features, choose their parameters on val, look at test once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from features_cache import Catalog
from pipeline.errors import FitError
from pipeline.evaluation.comparisons import compare_models, tell_ties
from pipeline.evaluation.leaks import tell_clusters
from pipeline.evaluation.rows import Layer, select
from pipeline.evaluation.splits import check_draws
from pipeline.heads.choose import Choice, tell_choices
from pipeline.heads.grid import Cut, check_trials, cut_layers, preference, run_trials
from pipeline.heads.predictions import TestPredictions, pool_folds, scores, summarise
from pipeline.heads.registry import Head, find_head, on_device
from pipeline.heads.saved import SavedModel, save_model
from pipeline.heads.trial import Outcome
from pipeline.model_file import check_destination
from pipeline.results import FitResult, Progress, SeedSummary, to_json

T = TypeVar("T")


class Trial(NamedTuple):
    """One head on one layer and split, and what came of it."""

    cut: Cut
    head: Head
    outcome: Outcome


@dataclass(frozen=True, eq=False)
class FitReport:
    """All results of a call, in the order layers × heads × seeds × shots.

    Parameters
    ----------
    results : list of FitResult
    predictions : list of TestPredictions
        One for each result.
    summary : list of SeedSummary
        One for each layer, head and number of shots, where there are several seeds; otherwise empty.
    notes : list of str
        What a user should know, a sentence each.
    classes : tuple of str
        Class names by number.
    best : int
        Index of the result that is saved: of those trained on most shots, the one of best validation accuracy, the
        first on a tie.
    saved : Path or None
        The model file.
    """

    results: list[FitResult]
    predictions: list[TestPredictions]
    summary: list[SeedSummary]
    notes: list[str]
    classes: tuple[str, ...]
    best: int
    saved: Path | None


def fit(
    cache: str | Path | Catalog,
    layers: Sequence[str] | None = None,
    heads: Sequence[str] = ("logreg",),
    seeds: Sequence[int] = (0,),
    shots: Sequence[int | str] = ("all",),
    source: str | None = None,
    backbone: str | None = None,
    pool: str | None = None,
    *,
    cv: int | None = None,
    balanced: bool = False,
    drop_leaks: bool = False,
    save: str | Path | None = None,
    jobs: int | None = None,
    device: str = "auto",
    progress: Progress | None = None,
    on_result: Callable[[FitResult, TestPredictions], None] | None = None,
) -> FitReport:
    """Train every head on every layer with every seed and number of shots.

    Parameters
    ----------
    cache : str, Path or Catalog
        A folder of cache files, or one file.
    layers : sequence of str, optional
        Layer names; ``A+B`` joins two. By default each layer of the one file that fits.
    heads : sequence of str, default ``("logreg",)``
        ``FAMILY`` or ``FAMILY/SCALING``, see `pipeline.heads.registry`.
    seeds : sequence of int, default ``(0,)``
        Draw the splits that the source does not give, and the shots.
    shots : sequence of int or "all", default ``("all",)``
        Training rows of each class; parameters are then chosen inside these rows only and val is not used.
    source, backbone, pool : str, optional
        Select a file where the cache holds several.
    cv : int, optional
        Cross-validate with so many folds in place of a test split: every row is test once, parameters are chosen
        inside the other folds, and a result is about all rows. Repeated with each seed.
    balanced : bool, default False
        Let every class count alike, whatever its size, in training and in the choice of parameters.
    drop_leaks : bool, default False
        Take test images out that repeat the bytes of training images.
    save : str or Path, optional
        Write a model here, as a skops file: of those trained on most shots, that of best validation accuracy.
    jobs : int, optional
        Fits at a time, each on one BLAS thread; by default one a core.
    device : str, default "auto"
        Where logistic regression is trained: ``"cuda"`` or ``"cuda:INDEX"``, one fit after another, or ``"cpu"``.
        ``"auto"`` is the CPU, whose many small fits no GPU has been measured to beat. Other heads know the CPU alone.
    progress : callable, optional
        Called as ``progress(done, total, text)`` after each fit.
    on_result : callable, optional
        Called as ``on_result(result, predictions)`` as soon as each fit is done, in the order in which they end; there
        is nothing to compare it with yet, so that its `p_vs_best` is None.

    Raises
    ------
    FitError
        If the rows do not allow a fit, raised before the first one; or the device has no memory for one.
    EngineError
        If there is no such device.
    CacheError
        If the cache or a layer cannot be found.
    ModelFileError
        If the model cannot be written.
    """
    if not heads:
        raise FitError("fitting needs at least one of heads, got none")
    check_draws(seeds, shots)
    if cv is not None and save is not None:
        raise FitError("cross-validation trains a model a fold and keeps none; fit without --cv to save one")
    seeds, shots = _distinct(seeds), _distinct(shots)
    chosen = _distinct([find_head(name) for name in heads])
    if device not in ("auto", "cpu"):
        from pipeline.engines.select import find_device

        chosen = [on_device(head, find_device(device)) for head in chosen]
    destination = None if save is None else check_destination(save)
    selected = select(cache if isinstance(cache, Catalog) else Catalog(cache), layers, source, backbone, pool)
    if len({layer.table.classes for layer in selected}) > 1:
        raise FitError("the layers are of sources with different classes; fit one source a call, named by --source")
    cuts = cut_layers(selected, seeds, shots, cv, drop_leaks=drop_leaks)
    trials = [(cut, head) for layer in selected for head in chosen for cut in cuts if cut.layer is layer]
    check_trials(trials, balanced=balanced)
    folds = cv or 1
    ended: dict[int, Outcome] = {}
    choices: dict[int, Choice] = {}
    found: dict[int, tuple[FitResult, TestPredictions]] = {}

    def collect(place: int, outcome: Outcome) -> None:
        ended[place], choices[place] = outcome, outcome.choice
        number = place // folds
        places = range(number * folds, (number + 1) * folds)
        if all(fold in ended for fold in places):
            cell = [Trial(*trials[fold], ended.pop(fold)) for fold in places]
            said = pool_folds([(trial.cut, trial.outcome) for trial in cell])
            found[number] = _result(cell, said, balanced, cv), said
            if on_result is not None:
                on_result(*found[number])

    keep = destination is not None
    model = run_trials(trials, jobs, progress, balanced=balanced, keep=keep, finished=collect)
    predictions = [found[number][1] for number in range(len(found))]
    p_values = compare_models([each.uris for each in predictions], [each.right for each in predictions])
    results = [replace(found[number][0], p_vs_best=p) for number, p in enumerate(p_values)]
    best = max(
        range(len(results)),
        key=lambda place: preference(results[place].shots, results[place].validation_accuracy, place),
    )
    if destination is not None:
        save_model(destination, _model(model, trials[best][0].layer, results[best]))
    notes = _notes(trials, choices, predictions) + tell_ties(p_values)
    summary = summarise(results, predictions)
    return FitReport(results, predictions, summary, notes, selected[0].table.classes, best, destination)


def _distinct(values: Sequence[T]) -> list[T]:
    return list(dict.fromkeys(values))


def _result(cell: Sequence[Trial], found: TestPredictions, balanced: bool, cv: int | None) -> FitResult:
    cut, outcomes = cell[0].cut, [trial.outcome for trial in cell]
    table = cut.layer.table
    params = [outcome.params for outcome in outcomes]
    return FitResult(
        kind="head",
        backbone=cut.layer.handle("backbone"),
        layer=cut.layer.name,
        pool=cut.layer.handle("pool"),
        head=cell[0].head.name,
        params=max(params, key=params.count),  # of the folds, the first on a tie
        seed=cut.seed,
        shots=cut.shots,
        n_train=_mean_count([trial.cut.splits.train for trial in cell]),
        n_val=_mean_count([trial.cut.splits.val for trial in cell]),
        n_pool=len(table.labels) - _mean_count([trial.cut.splits.test for trial in cell]),
        validation_accuracy=_mean_score([outcome.choice.score for outcome in outcomes]),
        **scores(found, len(table.classes)),
        seconds=sum(outcome.seconds for outcome in outcomes),
        converged=all(outcome.converged for outcome in outcomes),
        balanced=balanced,
        cv=cv,
    )


def _mean_count(parts: Sequence[NDArray[np.int64]]) -> int:
    return round(sum(len(part) for part in parts) / len(parts))


def _mean_score(scores: Sequence[float]) -> float | None:
    return None if any(map(math.isnan, scores)) else float(np.mean(scores))


def _model(pipeline: Any, layer: Layer, result: FitResult) -> SavedModel:
    return SavedModel(
        pipeline,
        result.head,
        result.params,
        layer.describe(),
        layer.table.classes,
        result.temperature,
        to_json(result),
    )


def _notes(
    trials: Sequence[tuple[Cut, Head]], choices: Mapping[int, Choice], predictions: Sequence[TestPredictions]
) -> list[str]:
    cuts = dict.fromkeys(cut for cut, _ in trials)
    notes = [note for cut in cuts for note in cut.layer.table.notes]
    notes += [note for cut in cuts for note in cut.splits.notes]
    seeds = {cut.seed for cut in cuts}
    if len(seeds) > 1 and len({cut.splits.train.tobytes() for cut in cuts if cut.shots == "all"}) == 1:
        notes.append(f"all splits are given, so that {len(seeds)} seeds give the same results: one is enough")
    notes += [note for each in predictions for note in tell_clusters(each.groups)]
    for head in dict.fromkeys(head for _, head in trials):
        notes += tell_choices(head, [choices[place] for place, (_, own) in enumerate(trials) if own is head])
    return _distinct(notes)
