"""Stage 2: train heads on cached features. Parameters are chosen on val; test is looked at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from features_cache import Catalog
from pipeline.arrays import IntArray
from pipeline.errors import FitError
from pipeline.evaluation.comparisons import best_notes, compare_results, preference
from pipeline.evaluation.gains import columns_gains
from pipeline.evaluation.labels import LabelsTable, find_labels
from pipeline.evaluation.leaks import cluster_notes
from pipeline.evaluation.metric_comparisons import compare_metrics, summarise_metrics
from pipeline.evaluation.metrics import mean_if_known
from pipeline.evaluation.multilabel import measure_labels
from pipeline.evaluation.predictions import Predictions, collect_predictions, measure
from pipeline.evaluation.regression import measure_numbers
from pipeline.evaluation.rows import Layer, select
from pipeline.evaluation.seeds import summarise_seeds
from pipeline.evaluation.split_layers import SplitLayer, split_layers
from pipeline.evaluation.splits import distinct_draws
from pipeline.evaluation.targets import check_task
from pipeline.extraction.object_store import open_catalog
from pipeline.heads.choose import Choice, choice_notes
from pipeline.heads.memory import streamed_notes
from pipeline.heads.parallel import check_trials, run_trials
from pipeline.heads.registry import Head, find_head
from pipeline.heads.saved import SavedModel, save_model
from pipeline.heads.trial import Trial, TrialOutcome
from pipeline.model_file import check_destination
from pipeline.neighbours.leaks import Nearness, keep_near_together, leak_price, nearness
from pipeline.options import CLASSIFICATION, DEFAULT_HEADS, MULTILABEL, NEAR, REGRESSION, whole
from pipeline.results import (
    LOWER_IS_BETTER,
    ColumnsGain,
    FitResult,
    MultilabelResult,
    Progress,
    RegressionResult,
    to_json,
)

T = TypeVar("T")
AnyResult = FitResult | RegressionResult | MultilabelResult


@dataclass(frozen=True, eq=False)
class FitReport:
    """All results of a call, in the order layers × heads × seeds × shots.

    Parameters
    ----------
    results : list of FitResult, RegressionResult or MultilabelResult
        According to the task.
    predictions : list of Predictions
        One for each result.
    summary : list of SeedSummary or MetricSummary
        One for each layer, head and number of shots; empty if there is a single seed.
    notes : list of str
        What a user should know, a sentence each.
    classes : tuple of str
        Names of the classes or labels by number.
    best : int
        Index of the result whose model is saved: of those with the most shots, the one of best validation score;
        ties go to the lower log-loss.
    saved : Path or None
        The model file.
    layer : Layer
        That of the best result.
    gains : list of ColumnsGain
        What joined columns add to each layer and head at each number of shots; empty without columns.
    """

    results: list[Any]
    predictions: list[Predictions]
    summary: list[Any]
    notes: list[str]
    classes: tuple[str, ...]
    best: int
    saved: Path | None
    layer: Layer
    gains: list[ColumnsGain]

    @property
    def may_be_best(self) -> set[tuple[str, str, int | str]]:
        """Layers, heads and numbers of shots that may be the best at these shots, over all seeds; see `may_be_best`."""
        return {(one.layer, one.head, one.shots) for one in self.summary or self.results if one.in_best_set}


def fit(
    cache: str | Path | Catalog,
    layers: Sequence[str] | None = None,
    heads: Sequence[str] | None = None,
    seeds: Sequence[int] = (0,),
    shots: Sequence[int | str] = ("all",),
    source: str | None = None,
    backbone: str | None = None,
    pool: str | None = None,
    *,
    labels: str | Path | LabelsTable | None = None,
    target: str | Sequence[str] | None = None,
    key: str | None = None,
    columns: Sequence[str] | None = None,
    task: str = CLASSIFICATION,
    cv: int | None = None,
    metric: str | None = None,
    balanced: bool = False,
    drop_leaks: bool | str = False,
    save: str | Path | None = None,
    jobs: int | None = None,
    device: str = "auto",
    progress: Progress | None = None,
    on_result: Callable[[Any, Predictions], None] | None = None,
) -> FitReport:
    """Train every head on every layer with every seed and number of shots.

    Parameters
    ----------
    cache : str, Path or Catalog
        A folder of cache files, or one file.
    layers : sequence of str, optional
        Layer names; ``A+B`` joins two. By default every layer of the one file that fits.
    heads : sequence of str, optional
        ``FAMILY`` or ``FAMILY/SCALING``, see `pipeline.heads.registry`; by default ``logreg``, for numbers ``ridge``.
    seeds : sequence of int, default ``(0,)``
        Draw the splits that the source does not give, and the shots.
    shots : sequence of int or "all", default ``("all",)``
        Number of training rows per class. Parameters are then chosen inside these rows, and val is not used. Labels and
        numbers are learnt from all rows.
    source, backbone, pool : str, optional
        Select a file if the cache holds several.
    labels, target, key
        A table to take labels from, and its columns, see `pipeline.evaluation.labels.read_labels`; by default labels
        are those of the source.
    columns : sequence of str, optional
        Columns of this table to join to the features: numbers, which are standardised, or categories, each of which
        becomes a feature of 0 and 1. Every head is trained without them and with them on the same rows and splits, and
        `FitReport.gains` says what they add. Rows with an empty cell are left out.
    task : str, default "classification"
        What is predicted: a class; any number of labels (``"multilabel"``), which a cell names with bars between them,
        or which are columns of 0 and 1; or a number (``"regression"``).
    cv : int, optional
        Number of folds of a cross-validation, which replaces the test split: every row is test once, parameters are
        chosen inside the other folds, and a result is about all rows. Repeated with each seed.
    metric : str, optional
        What parameters and the saved model are chosen by on validation rows, one of `pipeline.options.METRICS_OF` the
        task; by default the first.
    balanced : bool, default False
        Let every class count alike, whatever its size, in training and in the choice of parameters.
    drop_leaks : bool or "near", default False
        Leave out test images whose bytes equal those of training images. With ``"near"``, also those that are
        near-duplicates of training images as `pipeline.duplicates.duplicates` finds them, and keep groups of
        near-duplicates on one side of splits and folds that are drawn. Folds leave out no image.
    save : str or Path, optional
        Write a model to this ``.skops`` file: of those with the most shots, the best by `metric` on validation.
    jobs : int, optional
        Number of fits at a time, each on one BLAS thread; by default one per core, or as many as memory has room for.
        Fits whose rows do not fit into memory read them from the cache in each pass, one fit after another.
    device : str, default "auto"
        Where logistic regression is trained: ``"cuda"`` or ``"cuda:INDEX"``, one fit after another, or ``"cpu"``.
        ``"auto"`` is the CPU, because no GPU has yet been measured to be faster on many small fits. Other heads always
        use the CPU.
    progress : callable, optional
        Called as ``progress(done, total, text)`` after each fit.
    on_result : callable, optional
        Called as ``on_result(result, predictions)`` as soon as each fit is done, in the order in which they end. Its
        `p_vs_best` and `in_best_set` are None, because there is nothing to compare it with yet.

    Raises
    ------
    FitError
        If the rows do not allow a fit, or a head needs more memory than is free, raised before the first one; or if a
        device runs out of memory.
    EngineError
        If there is no such device.
    CacheError
        If the cache or a layer cannot be found.
    TableError
        If the table of labels cannot be read or joined.
    ModelFileError
        If the model cannot be written.

    Examples
    --------
    ::

        report = fit("cache", layers=["blocks.4"], heads=["logreg", "knn"], save="model.skops")
        for result in report.results:
            print(result.head, result.accuracy, result.accuracy_ci95)
    """
    seeds, shots = distinct_draws(seeds, shots)
    if cv is not None:
        if problem := whole(2).problem(cv):
            raise FitError(f"cv: {problem}")
        cv = int(cv)
    metric = check_task(task, metric, shots=set(shots) != {"all"}, balanced=balanced)
    if cv is not None and save is not None:
        raise FitError("cross-validation trains one model per fold and keeps none of them; use either cv or save")
    chosen = _find_heads((DEFAULT_HEADS[task],) if heads is None else heads, task, device)
    destination = None if save is None else check_destination(save, ".skops")
    if drop_leaks not in (False, True, NEAR):
        raise FitError(f"expected drop_leaks to be true, false or '{NEAR}', got {drop_leaks!r}")
    answers = find_labels(labels, target, key, task, columns)
    catalog = open_catalog(cache)
    selected = select(catalog, layers, source, backbone, pool, answers, task)
    if len({layer.table.classes for layer in selected}) > 1:
        raise FitError("the layers are of sources with different classes; name one source")
    near_notes: list[str] = []
    if drop_leaks == NEAR:
        selected, near_notes = keep_near_together(selected, catalog, progress)
    split = split_layers(selected, seeds, shots, cv, drop_leaks=bool(drop_leaks))
    trials = [Trial(data, head) for layer in selected for head in chosen for data in split if data.layer is layer]
    streamed = check_trials(trials, balanced=balanced, metric=metric)

    folds = cv or 1
    waiting: dict[int, TrialOutcome] = {}  # until all folds of their result are done
    choices: dict[int, Choice] = {}
    found: dict[int, tuple[Any, Predictions]] = {}
    distances: dict[tuple[Any, ...], Nearness] = {}  # of layers and splits, which heads and often seeds share

    def near_of(data: Sequence[SplitLayer]) -> Nearness:
        parts = [part for one in data for part in (one.splits.train, one.splits.val, one.splits.test)]
        rows = (data[0].layer.unjoined, data[0].layer.table, *(part.tobytes() for part in parts))
        if rows not in distances:
            distances[rows] = nearness(data[0].layer, [one.splits for one in data])
        return distances[rows]

    def finish(index: int, outcome: TrialOutcome) -> None:
        waiting[index], choices[index] = outcome, outcome.choice
        number = index // folds
        own = range(number * folds, (number + 1) * folds)
        if all(fold in waiting for fold in own):
            outcomes = [waiting.pop(fold) for fold in own]
            of_result = [trials[fold] for fold in own]
            result, predictions = _result(of_result, outcomes, balanced=balanced, cv=cv, metric=metric)
            if isinstance(result, FitResult):
                price = leak_price(near_of([trial.data for trial in of_result]), predictions)
                result = replace(result, leak_price=price)
            found[number] = result, predictions
            if on_result is not None:
                on_result(*found[number])

    keep = destination is not None
    model = run_trials(trials, streamed, jobs, progress, balanced=balanced, metric=metric, keep=keep, finished=finish)

    results = [found[number][0] for number in range(len(found))]
    predictions = [found[number][1] for number in range(len(found))]
    of_classes = task == CLASSIFICATION
    results = (compare_results if of_classes else compare_metrics)(results, predictions)
    losses = [one.validation_log_loss if of_classes else None for one in results]
    ranks = [preference(one.shots, one.validated, index, losses[index]) for index, one in enumerate(results)]
    best = ranks.index(max(ranks))
    if destination is not None:
        save_model(destination, _saved_model(model, trials[best].data.layer, results[best]))
    notes = _notes(trials, choices) + streamed_notes(streamed) + near_notes + best_notes(results)
    summary = (summarise_seeds if of_classes else summarise_metrics)(results, predictions)
    kept = trials[best * folds].data.layer
    gains = columns_gains([trial.data.layer for trial in trials[::folds]], results, predictions)
    return FitReport(results, predictions, summary, notes, kept.table.classes, best, destination, kept, gains)


def _distinct(values: Sequence[T]) -> list[T]:
    return list(dict.fromkeys(values))


def _find_heads(names: Sequence[str], task: str, device: str) -> list[Head]:
    if not names:
        raise FitError("expected at least one head, got none")
    heads = _distinct([find_head(name, task) for name in names])
    if device in ("auto", "cpu"):
        return heads
    from pipeline.engines.select import find_device

    found = find_device(device)
    return [replace(head, family=head.family.on_device(found)) for head in heads]


def _result(
    trials: Sequence[Trial], outcomes: Sequence[TrialOutcome], *, balanced: bool, cv: int | None, metric: str
) -> tuple[AnyResult, Predictions]:
    """Put together what the folds of a cross-validation, or a single trial, found."""
    data, table = trials[0].data, trials[0].data.layer.table
    splits = [trial.data.splits for trial in trials]
    predictions = collect_predictions(
        table,
        [each.test for each in splits],
        [outcome.y_pred for outcome in outcomes],
        [outcome.probabilities for outcome in outcomes],
        [outcome.choice.temperature for outcome in outcomes],
        [outcome.scores for outcome in outcomes],
    )
    validated = mean_if_known([outcome.choice.score for outcome in outcomes])
    picked = [outcome.choice.params for outcome in outcomes]
    most_picked = picked.index(max(picked, key=picked.count))  # ties go to the first fold
    trained: dict[str, Any] = {
        "kind": "head",
        "backbone": data.layer.handle("backbone"),
        "layer": data.layer.name,
        "pool": data.layer.handle("pool"),
        "head": trials[0].head.name,
        "params": outcomes[most_picked].params,
        "seed": data.seed,
        "shots": data.shots,
        "n_train": _mean_count([each.train for each in splits]),
        "n_val": _mean_count([each.val for each in splits]),
        "n_pool": round(sum(each.n_pool for each in splits) / len(splits)),
        "seconds": sum(outcome.seconds for outcome in outcomes),
        "converged": all(outcome.converged for outcome in outcomes),
        "cv": cv,
        "target": table.target,
        "metric": metric,
        "columns": data.layer.joined.names if data.layer.joined else None,
        "validation_score": -validated if validated is not None and metric in LOWER_IS_BETTER else validated,
    }
    if table.task == REGRESSION:
        return RegressionResult(**trained, **measure_numbers(predictions)), predictions
    if table.task == MULTILABEL:
        thresholds = np.mean(np.array([outcome.thresholds for outcome in outcomes]), axis=0)
        return MultilabelResult(**trained, **measure_labels(predictions, table.classes, thresholds)), predictions
    result = FitResult(
        **trained,
        validation_accuracy=validated if metric == "accuracy" else None,
        validation_log_loss=mean_if_known([outcome.choice.log_loss for outcome in outcomes]),
        **measure(predictions, len(table.classes)),
        balanced=balanced,
    )
    return result, predictions


def _mean_count(parts: Sequence[IntArray]) -> int:
    return round(sum(len(part) for part in parts) / len(parts))


def _saved_model(pipeline: Any, layer: Layer, result: AnyResult) -> SavedModel:
    return SavedModel(
        pipeline,
        result.head,
        result.params,
        layer.describe(),
        layer.table.classes,
        result.temperature if isinstance(result, FitResult) else None,
        to_json(result),
        layer.table.task,
        [one.threshold for one in result.labels] if isinstance(result, MultilabelResult) else None,
        [column.to_json() for column in layer.joined.columns] if layer.joined else [],
    )


def _notes(trials: Sequence[Trial], choices: Mapping[int, Choice]) -> list[str]:
    data = _distinct([trial.data for trial in trials])
    notes = [note for each in data for note in each.layer.table.notes]
    notes += [note for each in data for note in each.splits.notes]
    seeds = {each.seed for each in data}
    if len(seeds) > 1 and len({each.splits.train.tobytes() for each in data if each.shots == "all"}) == 1:
        notes.append(f"all splits are given, so {len(seeds)} seeds give the same results; one seed is enough")
    tests: dict[tuple[Layer, int, int | str], list[IntArray]] = {}
    for each in data:
        tests.setdefault((each.layer, each.seed, each.shots), []).append(each.splits.test)
    for (layer, _, _), folds in tests.items():
        tested = np.concatenate(folds)
        notes += cluster_notes(layer.table.clusters[tested], layer.table.groups[tested])
    for head in _distinct([trial.head for trial in trials]):
        notes += choice_notes(head, [choices[index] for index, trial in enumerate(trials) if trial.head is head])
    return _distinct(notes)
