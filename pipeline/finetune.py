"""Stage 3: fine-tune a network above its thaw line, on the same splits as `fit`, so that the two can be compared.

The frozen trunk runs only once: where images are not augmented, its activations come from the cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.arrays import Float64Array
from pipeline.evaluation.bootstrap import mean_known
from pipeline.evaluation.calibration import SMALLEST
from pipeline.evaluation.comparisons import best_notes, compare_results, preference
from pipeline.evaluation.labels import LabelsTable, find_labels
from pipeline.evaluation.leaks import cluster_notes
from pipeline.evaluation.metric_comparisons import compare_metrics
from pipeline.evaluation.metrics import check_metric, none_if_unknown, rate
from pipeline.evaluation.multilabel import EVEN, best_thresholds, measure_labels, rate_labels
from pipeline.evaluation.predictions import Predictions, collect_predictions, measure
from pipeline.evaluation.regression import measure_numbers, rate_numbers
from pipeline.evaluation.rows import Table
from pipeline.evaluation.splits import distinct_draws
from pipeline.evaluation.targets import check_task
from pipeline.images.sources.registry import ImageSource, open_source
from pipeline.model_file import check_destination
from pipeline.options import CLASSIFICATION, MULTILABEL, REGRESSION
from pipeline.results import (
    ExtractResult,
    FinetuneMultilabelResult,
    FinetuneRegressionResult,
    FinetuneResult,
    Progress,
    TunedResult,
    silent,
)
from pipeline.spec import DEFAULT_BACKBONE, DEFAULT_CACHE, DEFAULT_LAYER, DEFAULT_POOL, Size, json_fields

if TYPE_CHECKING:
    from pipeline.finetuning.data import TrainingData, TrainingSetup
    from pipeline.finetuning.run import TrainingRun


@dataclass(frozen=True, eq=False)
class FinetuneReport:
    """All results of a call, in the order seeds × shots.

    Parameters
    ----------
    results : list of FinetuneResult, FinetuneRegressionResult or FinetuneMultilabelResult
        According to the task.
    predictions : list of Predictions
        One for each result.
    notes : list of str
        What a user should know, a sentence each.
    classes : tuple of str
        Names of the classes or labels by number.
    best : int
        Index in `results` of the network that is saved: the one with the most shots; ties go to the higher validation
        accuracy, then to the first.
    saved : Path or None
        The model file.
    extracted : list of list of ExtractResult
        The results of each call of `pipeline.extract.extract`: the cache files that training read.
    """

    results: list[Any]
    predictions: list[Predictions]
    notes: list[str]
    classes: tuple[str, ...]
    best: int
    saved: Path | None
    extracted: list[list[ExtractResult]]


def finetune(
    source: str | Path | ImageSource,
    backbone: str = DEFAULT_BACKBONE,
    *,
    freeze: str = "all",
    seeds: Sequence[int] = (0,),
    shots: Sequence[int | str] = ("all",),
    labels: str | Path | LabelsTable | None = None,
    target: str | Sequence[str] | None = None,
    key: str | None = None,
    task: str = CLASSIFICATION,
    output: str | Path = DEFAULT_CACHE,
    init: str = "pretrained",
    head_first: bool = False,
    watch: str | None = None,
    metric: str | None = None,
    save: str | Path | None = None,
    precision: str = "auto",
    store: str = "float32",
    size: Size | None = None,
    white: int | None = None,
    engine: str = "auto",
    device: str = "auto",
    workers: int | None = None,
    cluster: str | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
    **training: Any,
) -> FinetuneReport:
    """Train a network above its thaw line, once for each seed and number of shots.

    Parameters
    ----------
    source : str, Path or ImageSource
        Anything `pipeline.extract.extract` takes; with labels, unless a table has them.
    backbone : str, default "efficientnet_lite0"
        ``NAME`` or ``NAME@WEIGHTS``.
    freeze : str, default "all"
        The last layer that is frozen; ``"all"`` trains only the new top, ``"none"`` everything.
    seeds : sequence of int, default (0,)
        Each draws the splits that the source does not give, the shots, the order of batches, and random weights.
    shots : sequence of int or "all", default ("all",)
        Training images of each class. With a number there are no validation images, since these would be more shots,
        and so no early stopping.
    labels, target, key, task
        A table to take labels from, and what is predicted, as for `pipeline.fit.fit`. Labels are trained by binary
        cross-entropy, numbers by squared error.
    output : str or Path, default "thawline-cache"
        Cache folder. Layers that it lacks, and checkpoints, are written to the folder ``finetune`` in it.
    init : {"pretrained", "random"}
        ``random`` trains from scratch.
    head_first : bool, default False
        Train the new top on frozen features first, then everything above the line (LP-FT; Kumar et al. 2022).
    watch : {"gradients"}, optional
        Record the norms of each thawed layer's gradients, steps and weights, and its dead units, in the history of the
        results (see `pipeline.finetuning.watch.GradientWatch`), and add a note where they look bad.
    metric : str, optional
        What networks are compared by on validation rows, one of `pipeline.options.METRICS_OF` the task; by default the
        first. Training stops early by validation loss, whatever the metric.
    save : str or Path, optional
        Write the network that was trained with the most shots to this ``.safetensors`` file; ties go to the better
        metric on validation rows, then to the lower validation loss (of classes the log-loss, whatever is minimised).
    precision : {"auto", "fp32", "bf16"}
        Of the trunk as for extraction; of the thawed part, ``auto`` is bf16 where that trains faster.
    store, size, white, engine, device, workers, cluster
        As for extraction; only that, and not the training, runs on a cluster.
    progress : callable, optional
        ``progress(done, total, text, latest losses)``.
    say : callable, optional
        Called at once with what the user should know before training, such as the disk space that activations take;
        by default this goes to the notes.
    **training
        Fields of `pipeline.finetuning.recipe.Recipe`: ``lr``, ``layer_decay``, ``lr_at``, ``epochs``, ``patience``,
        ``optimizer``, ``weight_decay``, ``schedule``, ``warmup``, ``batch_size``, ``label_smoothing``,
        ``class_weights``, ``augment``, ``views``, ``clip``, ``top``.

    Returns
    -------
    FinetuneReport

    Raises
    ------
    FitError
        If an option is wrong, the rows cannot be split, or the loss is not finite before the first epoch is over.
    BackboneError
        If the thaw line cannot be drawn there; the message says where it can.
    ThawlineError
        Whatever extraction raises.
    ModelFileError
        If the model cannot be written; before any work where `save` says so already.
    """
    destination = None if save is None else check_destination(save, ".safetensors")
    from pipeline.finetuning.data import TrainingSetup, prepare_data
    from pipeline.finetuning.network import save_finetuned
    from pipeline.finetuning.recipe import check_start, make_recipe
    from pipeline.finetuning.run import run_training

    recipe = make_recipe(training)
    check_start(recipe, backbone, freeze, init=init, head_first=head_first, precision=precision, watch=watch)
    seeds, shots = distinct_draws(seeds, shots)
    of_classes = {name: getattr(recipe, name) for name in ("class_weights", "label_smoothing")}
    metric = check_task(task, metric, shots=set(shots) != {"all"}, **of_classes)
    notes: list[str] = []
    setup = TrainingSetup(
        open_source(source), backbone, freeze, recipe, init, head_first, watch is not None, Path(output), precision,
        store, size, white, engine, device, workers, cluster, progress or silent, say or notes.append,
        find_labels(labels, target, key, task), task,
    )  # fmt: skip
    results: list[Any] = []
    predictions: list[Predictions] = []
    best, best_network = 0, None
    for same_weights in [[seed] for seed in seeds] if init == "random" else [seeds]:
        initial = f"{backbone}@random:{same_weights[0]}" if init == "random" else backbone
        draws = list(itertools.product(same_weights, shots))
        data = prepare_data(replace(setup, backbone=initial), draws)
        if destination is not None:
            data.backbone.check_rebuilt()
        if task == CLASSIFICATION:
            check_metric(metric, len(data.table.classes))
        notes += data.table.notes
        for seed, count in draws:
            run = run_training(data, setup, seed, count)
            clusters, groups = data.table.clusters[run.splits.test], data.table.groups[run.splits.test]
            notes += [*run.splits.notes, *cluster_notes(clusters, groups), *run.trained.notes]
            if count == "all" and not len(run.splits.val):
                notes.append("without validation images training goes through all epochs and keeps the last weights")
            result, predicted = _result(run, data, setup, seed, count, metric)
            results.append(result)
            predictions.append(predicted)
            ranks = [preference(one.shots, one.validated, index, _valid_loss(one)) for index, one in enumerate(results)]
            best = ranks.index(max(ranks))
            if destination is not None and best == len(results) - 1:
                best_network = run.network
            del run  # frees its network before the next run
    results = (compare_results if task == CLASSIFICATION else compare_metrics)(results, predictions)
    if destination is not None and best_network is not None:
        save_finetuned(destination, best_network, data.backbone, data.table.classes, task, results[best])
    notes = list(dict.fromkeys([*notes, *best_notes(results)]))
    return FinetuneReport(results, predictions, notes, data.table.classes, best, destination, setup.extracted)


def _valid_loss(result: TunedResult) -> float | None:
    """Return what ties go by: the log-loss of classes, else the loss that training minimised; None without any."""
    if isinstance(result, FinetuneResult):
        return result.validation_log_loss
    loss: float | None = result.history[result.params["best_epoch"] - 1].get("valid_loss")
    return loss


def _result(
    run: TrainingRun, data: TrainingData, setup: TrainingSetup, seed: int, shots: int | str, metric: str
) -> tuple[TunedResult, Predictions]:
    table, splits, trained = data.table, run.splits, run.trained
    thresholds = None
    if table.task == MULTILABEL:
        thresholds = np.full(len(table.classes), EVEN)
        if run.val_found is not None:
            thresholds = best_thresholds(table.y[splits.val], run.val_found, EVEN)
    y_pred = _answers(table.task, run.found, thresholds)
    said = None if table.task == REGRESSION else run.found
    predictions = collect_predictions(table, [splits.test], [y_pred], [said], [run.temperature])
    params = json_fields(setup.recipe) | {"lr": setup.rate, "init": setup.init, "head_first": setup.head_first}
    params |= {"precision": run.network.precision, "best_epoch": trained.best_epoch}
    shared: dict[str, Any] = {
        "kind": "finetune",
        "backbone": data.backbone.handle,
        "layer": DEFAULT_LAYER,
        "pool": DEFAULT_POOL,
        "head": setup.recipe.top,
        "params": params,
        "seed": seed,
        "shots": shots,
        "n_train": len(splits.train),
        "n_val": len(splits.val),
        "n_pool": splits.n_pool,
        "seconds": run.seconds,
        "converged": not trained.diverged,
        "freeze": setup.freeze,
        "epochs": len(trained.history),
        "trainable_parameters": sum(item.numel() for item in run.network.parameters() if item.requires_grad),
        "history": trained.history,
        "target": table.target,
        "metric": metric,
        "validation_score": _validated(run, table, metric, thresholds),
    }
    if table.task == REGRESSION:
        return FinetuneRegressionResult(**shared, **measure_numbers(predictions)), predictions
    if thresholds is not None:
        return FinetuneMultilabelResult(**shared, **measure_labels(predictions, table.classes, thresholds)), predictions
    result = FinetuneResult(
        **shared,
        **measure(predictions, len(table.classes)),
        balanced=setup.recipe.class_weights,
        validation_accuracy=shared["validation_score"] if metric == "accuracy" else None,
        validation_log_loss=_validation_log_loss(run, table, balanced=setup.recipe.class_weights),
    )
    return result, predictions


def _validation_log_loss(run: TrainingRun, table: Table, *, balanced: bool) -> float | None:
    """Return the log-loss on validation rows before calibration, None without any.

    Unlike the loss of training it has no label smoothing. It is that of heads (see `pipeline.heads.choose.search`): if
    `balanced`, every class counts alike; rows of classes without a training row count as 0.
    """
    from pipeline.heads.choose import balanced_weights

    if run.val_found is None:
        return None
    y_val = table.y[run.splits.val]
    given = np.maximum(run.val_found[np.arange(len(y_val)), y_val], SMALLEST)
    losses = np.where(np.isin(y_val, table.y[run.splits.train]), -np.log(given), 0.0)
    return round(float(np.average(losses, weights=balanced_weights(y_val) if balanced else None)), 6)


def _answers(task: str, found: Float64Array, thresholds: Float64Array | None) -> NDArray[Any]:
    """Return class numbers, labels or numbers for what a network says of rows."""
    if task == REGRESSION:
        return found[:, 0]
    return found.argmax(1) if thresholds is None else found >= thresholds


def _validated(run: TrainingRun, table: Table, metric: str, thresholds: Float64Array | None) -> float | None:
    """Return the metric on validation rows; None without any, or if it is not defined on them."""
    if run.val_found is None:
        return None
    if metric == "accuracy":
        accuracy: float | None = run.trained.history[run.trained.best_epoch - 1].get("valid_acc")
        return accuracy
    y_val, y_pred = table.y[run.splits.val], _answers(table.task, run.val_found, thresholds)
    once = np.ones((1, len(y_val)))
    if table.task == REGRESSION:
        return none_if_unknown(float(rate_numbers(metric, y_val, y_pred, once)[0]))
    if thresholds is not None:
        return none_if_unknown(float(mean_known(rate_labels(metric, y_val, y_pred, run.val_found, None, once))[0]))
    return none_if_unknown(rate(metric, y_val, y_pred, len(table.classes), run.val_found))
