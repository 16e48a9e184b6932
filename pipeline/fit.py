"""Stage 2: train heads on cached features, choose their parameters on val, look at test once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from features_cache import Catalog
from pipeline.errors import FitError
from pipeline.evaluation.comparisons import compare_models, tell_ties
from pipeline.evaluation.intervals import wilson
from pipeline.evaluation.leaks import tell_clusters
from pipeline.evaluation.metrics import evaluate, expected_calibration_error, log_loss
from pipeline.evaluation.splits import check_draws
from pipeline.heads.cached import Layer, select
from pipeline.heads.predictions import TestPredictions, pool_folds, summarise
from pipeline.heads.registry import Head, find_head, on_device
from pipeline.heads.schedule import Cut, Progress, check_trials, cut_layers, run_trials, validated
from pipeline.heads.search import tell_choices
from pipeline.heads.store import SavedModel, check_destination, current_versions, save_model
from pipeline.heads.trial import Outcome
from pipeline.results import FitResult, SeedSummary, to_json

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
        Index of the result of best validation accuracy, the first on a tie: the one that is saved.
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
        Write the model of best validation accuracy here, as a skops file.
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
    waiting: dict[int, dict[int, Trial]] = {}

    def pass_on(place: int, outcome: Outcome) -> None:
        cell = waiting.setdefault(place // (cv or 1), {})
        cell[place] = Trial(*trials[place], outcome)
        if on_result is not None and len(cell) == (cv or 1):
            done = [cell[fold] for fold in sorted(cell)]
            found = pool_folds([(trial.cut, trial.outcome) for trial in done])
            on_result(_result(done, found, balanced, cv, None), found)

    keep = destination is not None
    finished = run_trials(trials, jobs, progress, balanced=balanced, keep=keep, finished=pass_on)
    done = [Trial(cut, head, outcome) for (cut, head), outcome in zip(trials, finished.outcomes, strict=True)]
    folds = cv or 1
    cells = [done[start : start + folds] for start in range(0, len(done), folds)]
    predictions = [pool_folds([(trial.cut, trial.outcome) for trial in cell]) for cell in cells]
    p_values = compare_models([each.uris for each in predictions], [each.right for each in predictions])
    results = [_result(cell, each, balanced, cv, p) for cell, each, p in zip(cells, predictions, p_values, strict=True)]
    best = int(np.argmax([np.mean([validated(trial.outcome) for trial in cell]) for cell in cells]))
    if destination is not None:
        save_model(destination, _model(finished.model, cells[best][0].cut.layer, results[best]))
    notes = _notes(done, predictions) + tell_ties(p_values)
    summary = summarise(results, predictions)
    return FitReport(results, predictions, summary, notes, selected[0].table.classes, best, destination)


def _distinct(values: Sequence[T]) -> list[T]:
    return list(dict.fromkeys(values))


def _result(
    cell: Sequence[Trial], found: TestPredictions, balanced: bool, cv: int | None, p_vs_best: float | None
) -> FitResult:
    cut, outcomes = cell[0].cut, [trial.outcome for trial in cell]
    n_classes = len(cut.layer.table.classes)
    params = [outcome.params for outcome in outcomes]
    scores = evaluate(found.y_true, found.y_pred, n_classes, found.probabilities)
    calibrated = found.calibrated
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
        n_test=len(found.y_true),
        validation_accuracy=_mean_score([outcome.choice.score for outcome in outcomes]),
        accuracy_ci95=wilson(int(found.right.sum()), len(found.right)),
        **asdict(scores),
        seconds=sum(outcome.seconds for outcome in outcomes),
        converged=all(outcome.converged for outcome in outcomes),
        balanced=balanced,
        cv=cv,
        temperature=None if found.temperatures is None else float(np.median(found.temperatures)),
        log_loss_calibrated=None if calibrated is None else log_loss(found.y_true, calibrated),
        ece_calibrated=None if calibrated is None else expected_calibration_error(found.y_true, calibrated),
        p_vs_best=p_vs_best,
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
        current_versions(),
    )


def _notes(done: Sequence[Trial], predictions: Sequence[TestPredictions]) -> list[str]:
    cuts = dict.fromkeys(trial.cut for trial in done)
    notes = [note for cut in cuts for note in cut.layer.table.notes]
    notes += [note for cut in cuts for note in cut.splits.notes]
    seeds = {cut.seed for cut in cuts}
    if len(seeds) > 1 and len({cut.splits.train.tobytes() for cut in cuts if cut.shots == "all"}) == 1:
        notes.append(f"all splits are given, so that {len(seeds)} seeds give the same results: one is enough")
    notes += [note for each in predictions for note in tell_clusters(each.groups)]
    for head in dict.fromkeys(trial.head for trial in done):
        notes += tell_choices(head, [trial.outcome.choice for trial in done if trial.head is head])
    return _distinct(notes)
