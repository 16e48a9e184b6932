"""One run: a seed and a number of shots, from the split to the test images' labels."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features_cache import explained
from pipeline.arrays import IntArray
from pipeline.engines.float32 import exact_float32
from pipeline.evaluation.calibration import fit_temperature
from pipeline.evaluation.rows import Table
from pipeline.evaluation.splits import Splits
from pipeline.finetuning.inputs import Part, Reader
from pipeline.finetuning.material import Material, splits_of
from pipeline.finetuning.network import ALL, Network
from pipeline.finetuning.plan import Plan
from pipeline.finetuning.precision import train_precision
from pipeline.finetuning.recipe import Recipe
from pipeline.finetuning.train import Trained, standardise, train
from pipeline.invalidation import stage_key
from pipeline.spec import NO_AUGMENT

HEAD_EPOCHS = 10
"""Epochs of the new top alone, at most, where it trains first."""


@dataclass(frozen=True, eq=False)
class Run:
    """What came of a run.

    Parameters
    ----------
    splits : Splits
    network : Network
        With the best weights, in eval mode.
    trained : Trained
    probabilities : (n, K) float64
        Of test rows, as the network gives them.
    temperature : float or None
        What calibrates them, fitted on validation rows; None without any.
    seconds : float
        Of training, those before a checkpoint included, and of calibration and test.
    precision : str
        In which what is thawed was trained.
    """

    splits: Splits
    network: Network
    trained: Trained
    probabilities: NDArray[np.float64]
    temperature: float | None
    seconds: float
    precision: str


@exact_float32()
def run(material: Material, plan: Plan, seed: int, shots: int | str) -> Run:
    """Split as `fit` does, train on train, stop by val, label test.

    Raises
    ------
    FitError
        If the rows do not allow it, or the loss is not finite.
    CacheError
        If a checkpoint is damaged, or their folder cannot be made.
    """
    began = time.perf_counter()
    n_classes = len(material.table.classes)
    table, recipe, device = material.table, plan.recipe, material.resolved.device
    splits = splits_of(table, seed, shots)
    network = Network(material.backbone, plan.freeze, recipe.top, n_classes)
    network.trunk_precision = material.trunk_precision
    network.precision = train_precision(network, material.resolved, plan.precision)
    name = f"{material.backbone.handle}, freeze {plan.freeze}, seed {seed}, shots {shots}"
    inputs: dict[str, Any] = {
        "freeze": plan.freeze,
        "recipe": recipe.to_json(),
        "rate": plan.rate,
        "precision": network.precision,
        "trunk_precision": material.trunk_precision,
        "store": plan.store,
        "backbone": material.backbone.name,
        "weights": material.backbone.weights_digest,
        "preprocessing": asdict(material.backbone.preprocessing),
        "device": device,
        "seed": seed,
        "n_classes": n_classes,
        "rows": _digest(table, splits),
    }
    with explained(plan.folder, "make the folder of checkpoints"):
        plan.folder.mkdir(parents=True, exist_ok=True)
    part, valid, test = _parts(material.reader, table, splits, recipe, seed)
    earlier = 0.0
    if material.features is None:
        standardise(network, part, device)
    else:
        head = Network(material.backbone, ALL, recipe.top, n_classes)
        parts = _parts(material.features, table, splits, replace(recipe, augment=NO_AUGMENT), seed)
        earlier = _train_head(head, n_classes, parts, plan, inputs, seed, device, name)
        network.new_head.load_state_dict(head.new_head.state_dict())
    key = stage_key("checkpoint", part="network", head_first=plan.head_first, watch=plan.watch, **inputs)
    checkpoint = plan.folder / f"{key}.pt"
    trained = train(
        network, recipe, plan.rate, part, valid, n_classes, checkpoint, seed, device, plan.progress, name,
        watch=plan.watch,
    )  # fmt: skip
    temperature = None if valid is None else fit_temperature(trained.net.predict_part(valid), valid.labels)
    probabilities = trained.net.predict_part(test)
    seconds = time.perf_counter() - began + earlier + trained.earlier
    return Run(splits, network.eval(), trained, probabilities, temperature, seconds, network.precision)


def _parts(reader: Reader, table: Table, splits: Splits, recipe: Recipe, seed: int) -> tuple[Part, Part | None, Part]:
    """Return train, val (None where it is empty) and test."""
    rows, size = table.rows[0], recipe.batch_size

    def part(index: IntArray, order: int | None, *, augmented: bool = False) -> Part:
        return Part(reader, rows[index], table.labels[index], size, order, augmented=augmented)

    train_part = part(splits.train, seed, augmented=recipe.augment != NO_AUGMENT)
    return train_part, part(splits.val, None) if len(splits.val) else None, part(splits.test, None)


def _train_head(
    head: Network,
    classes: int,
    parts: tuple[Part, Part | None, Part],
    plan: Plan,
    inputs: Mapping[str, Any],
    seed: int,
    device: str,
    name: str,
) -> float:
    """Train the new top alone on frozen features; return the seconds of epochs that came from a checkpoint."""
    part, valid, _ = parts
    standardise(head, part, device)
    recipe = replace(plan.recipe, epochs=min(plan.recipe.epochs, HEAD_EPOCHS), layer_decay=1.0, lr_at=())
    checkpoint = plan.folder / f"{stage_key('checkpoint', part='new top', **inputs)}.pt"
    rate = recipe.rate(new_only=True)
    name = f"{name}, head"
    return train(head, recipe, rate, part, valid, classes, checkpoint, seed, device, plan.progress, name).earlier


def _digest(table: Table, splits: Splits) -> str:
    """Return a digest of the images that train and choose, and of their labels."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (splits.train, splits.val):
        digest.update(np.ascontiguousarray(table.digests[part]).tobytes() + table.labels[part].tobytes() + b"|")
    return digest.hexdigest()
