"""One run: a seed and a number of shots, from the split to the probabilities of the test images."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.special import expit, softmax

from features_cache import explained
from pipeline.arrays import Float64Array, IntArray
from pipeline.engines.torch_engine import exact_float32
from pipeline.evaluation.calibration import useful_temperature
from pipeline.evaluation.rows import Table
from pipeline.evaluation.splits import Splits
from pipeline.finetuning.data import TrainingData, TrainingSetup, splits_of
from pipeline.finetuning.inputs import InputReader, Subset
from pipeline.finetuning.loop import Trained, predict_scores, standardise, train
from pipeline.finetuning.network import ALL, ThawedNetwork, train_precision
from pipeline.finetuning.objective import Classification, Labels, Numbers, Objective, class_weights
from pipeline.finetuning.recipe import Recipe
from pipeline.invalidation import stage_key
from pipeline.options import CLASSIFICATION, MULTILABEL, REGRESSION
from pipeline.spec import NO_AUGMENT, json_fields

TOP_EPOCHS = 10
"""Most epochs in which the new top trains alone, if it trains first."""


@dataclass(frozen=True, eq=False)
class TrainingRun:
    """The outcome of `run_training`: the network with its best weights, and what it says of the test rows.

    `found` are probabilities (n, k) of classes or labels, or numbers (n, 1), and `val_found` those of the validation
    rows, None without any. Those of classes are not calibrated; `temperature`, None without validation rows, does so.
    `seconds` are those of training (with the epochs that came from a checkpoint),
    calibration and test.
    """

    splits: Splits
    network: ThawedNetwork
    trained: Trained
    found: Float64Array
    val_found: Float64Array | None
    temperature: float | None
    seconds: float


@exact_float32()
def run_training(data: TrainingData, setup: TrainingSetup, seed: int, shots: int | str) -> TrainingRun:
    """Split as `fit` does, train on train, stop early by val, and predict test."""
    began = time.perf_counter()
    recipe, table, backbone, device = setup.recipe, data.table, data.backbone, data.resolved.device
    name = f"{backbone.handle}, freeze {setup.freeze}, seed {seed}, shots {shots}"
    splits = splits_of(table, seed, shots)
    rows, val, test = _subsets(data.reader, table, splits, recipe, seed)
    torch.manual_seed(seed)  # draws the weights of a hidden layer in the new top
    network = ThawedNetwork(backbone, setup.freeze, recipe.top, _outputs(table))
    network.trunk_precision = data.trunk_precision
    network.precision = train_precision(network, data.resolved, setup.precision)
    inputs = _inputs(data, setup, seed, splits, network.precision)
    with explained(setup.folder, "make the folder of checkpoints"):
        setup.folder.mkdir(parents=True, exist_ok=True)
    top_seconds = 0.0
    if data.features is None:
        standardise(network, rows, device, training=setup.init == "random")
    else:
        top_seconds = _train_top(network, data.features, data, setup, splits, inputs, seed, name)
    key = stage_key("checkpoint", part="network", head_first=setup.head_first, watch=setup.watch, **inputs)
    checkpoint = setup.folder / f"{key}.pt"
    objective = _objective(recipe, rows, table)
    trained = train(
        network, recipe, setup.rate, rows, val, objective, checkpoint, seed, device, setup.progress, name,
        watch=setup.watch,
    )  # fmt: skip
    if isinstance(objective, Numbers):
        network.new_head.rescale(objective.mean, objective.spread)
    temperature = held = None
    if val is not None:
        held = _said(table.task, predict_scores(network, val, device))
        temperature = useful_temperature(held, val.labels) if table.task == CLASSIFICATION else None
    found = _said(table.task, predict_scores(network, test, device))
    seconds = time.perf_counter() - began + top_seconds + trained.resumed_seconds
    return TrainingRun(splits, network, trained, found, held, temperature, seconds)


def _outputs(table: Table) -> int:
    return 1 if table.task == REGRESSION else len(table.classes)


def _said(task: str, scores: Float64Array) -> Float64Array:
    """Return probabilities (n, k) for the scores of classes or labels; numbers (n, 1) are as they are."""
    if task == REGRESSION:
        return scores
    return np.asarray(softmax(scores, axis=1) if task == CLASSIFICATION else expit(scores))


def _subsets(
    reader: InputReader, table: Table, splits: Splits, recipe: Recipe, seed: int
) -> tuple[Subset, Subset | None, Subset]:
    """Return train, val (None if it is empty) and test."""
    rows, size = table.rows[0], recipe.batch_size

    def subset(index: IntArray, order: int | None, *, augmented: bool = False) -> Subset:
        return Subset(reader, rows[index], table.y[index], size, order, augmented=augmented)

    train_rows = subset(splits.train, seed, augmented=recipe.augment != NO_AUGMENT)
    return train_rows, subset(splits.val, None) if len(splits.val) else None, subset(splits.test, None)


def _objective(recipe: Recipe, rows: Subset, table: Table) -> Objective:
    if table.task == MULTILABEL:
        return Labels()
    if table.task == REGRESSION:
        return Numbers(float(rows.labels.mean()), float(rows.labels.std()) or 1.0)
    n_classes = len(table.classes)
    weights = class_weights(np.bincount(rows.labels, minlength=n_classes)) if recipe.class_weights else None
    return Classification(weights, recipe.label_smoothing)


def _train_top(
    network: ThawedNetwork,
    features: InputReader,
    data: TrainingData,
    setup: TrainingSetup,
    splits: Splits,
    inputs: Mapping[str, Any],
    seed: int,
    name: str,
) -> float:
    """Train the new top of `network` alone on frozen features; return the seconds of epochs from a checkpoint."""
    device = data.resolved.device
    epochs = min(setup.recipe.epochs, TOP_EPOCHS)
    recipe = replace(setup.recipe, epochs=epochs, layer_decay=1.0, lr_at=(), augment=NO_AUGMENT)
    rows, val, _ = _subsets(features, data.table, splits, recipe, seed)
    top_only = ThawedNetwork(data.backbone, ALL, recipe.top, _outputs(data.table))
    standardise(top_only, rows, device)
    checkpoint = setup.folder / f"{stage_key('checkpoint', part='new top', **inputs)}.pt"
    rate, objective = recipe.rate(new_only=True), _objective(recipe, rows, data.table)
    name = f"{name}, head"
    trained = train(top_only, recipe, rate, rows, val, objective, checkpoint, seed, device, setup.progress, name)
    network.new_head.load_state_dict(top_only.new_head.state_dict())
    return trained.resumed_seconds


def _inputs(data: TrainingData, setup: TrainingSetup, seed: int, splits: Splits, precision: str) -> dict[str, Any]:
    """Return everything that the weights of a run depend on, apart from code; it names the checkpoint."""
    backbone, table = data.backbone, data.table
    rows = hashlib.blake2b(digest_size=16)
    for index in (splits.train, splits.val):
        rows.update(np.ascontiguousarray(table.digests[index]).tobytes() + table.y[index].tobytes() + b"|")
    return {
        "freeze": setup.freeze,
        "init": setup.init,  # of the same random weights, those drawn here are standardised in another way
        "recipe": json_fields(setup.recipe),
        "rate": setup.rate,
        "precision": precision,
        "trunk_precision": data.trunk_precision,
        "store": setup.store,
        "backbone": backbone.name,
        "weights": backbone.weights_digest,
        **({"heads": len(backbone.classifiers)} if len(backbone.classifiers) > 1 else {}),
        "preprocessing": json_fields(backbone.preprocessing),
        "device": data.resolved.device,
        "seed": seed,
        "n_classes": len(table.classes),
        **({} if table.task == CLASSIFICATION else {"task": table.task}),
        "rows": rows.hexdigest(),
    }
