"""Near-duplicates of training images among test images: keep them out, and say what they add to the accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from features_cache import CacheFile, Catalog, digest_keys
from pipeline.arrays import Float32Array, IntArray
from pipeline.evaluation.intervals import accuracy_interval, effective_rows, number_clusters
from pipeline.evaluation.leaks import NearDuplicates
from pipeline.evaluation.predictions import Predictions
from pipeline.evaluation.rows import Layer, Table
from pipeline.evaluation.splits import Splits
from pipeline.neighbours.groups import group_images
from pipeline.neighbours.nearest import ROUNDING, Pairs, near_pairs, nearest_rows
from pipeline.neighbours.planting import kept_threshold, threshold_of
from pipeline.neighbours.rows import DistinctImages, UnitRows
from pipeline.results import LeakPrice, NearnessBin, NearThreshold, Progress
from pipeline.spec import DEFAULT_LAYER, is_outdated

BINS = 4
MOST_TESTED = 2000
"""Test images that are compared with the training images; of more, so many are drawn."""
RAW = "input"


def keep_near_together(
    layers: Sequence[Layer], catalog: Catalog, progress: Progress | None, threshold: float | None = None
) -> tuple[list[Layer], list[str]]:
    """Return layers whose tables say which rows are near-duplicates, and notes on how far that can be trusted.

    They are judged on the ``penultimate`` layer of the same source, backbone and pooling if there is one, else on the
    last layer of the file; so all layers of one file have the same splits.
    """
    tables: dict[Table, Table] = {}
    judged: dict[CacheFile, tuple[DistinctImages, NearThreshold, Pairs]] = {}
    notes = []
    for table in dict.fromkeys(layer.table for layer in layers):
        file = _judge(catalog, table.files[0])
        if file not in judged:
            images = DistinctImages(file, _deepest(list(file.layers)))
            near = threshold_of(images, threshold, progress=progress)
            judged[file] = images, near, near_pairs(images, near.threshold)
        images, near, pairs = judged[file]
        number_of = {key: number for number, key in enumerate(images.keys.tolist())}
        keys = digest_keys(table.digests).tolist()  # an image that this file lacks is near no other
        shown = np.array([number_of.setdefault(key, len(number_of)) for key in keys], np.int64)
        groups = np.concatenate([group_images(pairs, len(images)), np.arange(len(images), len(number_of))])
        tables[table] = replace(table, near=NearDuplicates(shown, groups, pairs.first, pairs.second))
        notes.append(_near_note(near, np.bincount(groups[shown]), len(shown)))
    return [replace(layer, table=tables[layer.table]) for layer in layers], list(dict.fromkeys(notes))


def _near_note(near: NearThreshold, sizes: IntArray, rows: int) -> str:
    told = "" if near.recall_all is None else f"; this finds {near.recall_all:.0%} of planted copies"
    if near.false_alarms is not None:
        told += f", with false alarms on {near.false_alarms:.1%} of the images"
    elif near.copies:
        told += "; false alarms could not be measured, because the source has neither groups nor classes"
    return (
        f"{sizes[sizes > 1].sum()} of {rows} images are in groups of near-duplicates (similarity {near.threshold:.3f} "
        f"or more on {near.layer}), which stay together in splits and folds that are drawn{told}"
    )


def _judge(catalog: Catalog, file: CacheFile) -> CacheFile:
    """Return the file whose `penultimate` tells what is near: this one, or one like it; this one if none has it."""
    alike = (
        other
        for other in (file, *catalog.files)
        if other.handles == file.handles and DEFAULT_LAYER in other.layers and not is_outdated(other)
    )
    return next(alike, file)


def _deepest(names: Sequence[str]) -> str:
    """Return ``penultimate``, or else the last layer that is not the raw image."""
    if DEFAULT_LAYER in names:
        return DEFAULT_LAYER
    return next((name for name in reversed(names) if name != RAW), RAW)


class Nearness(NamedTuple):
    """How near the nearest training image of each test row is.

    Attributes
    ----------
    layer : str
        On which images were compared.
    similarity : (m,) float32
        Of the test rows of all folds in their order in the table; NaN for rows that were not drawn.
    threshold : float or None
        From which on images count as near-duplicates, if it was measured on this layer and is kept beside the cache.
    """

    layer: str
    similarity: Float32Array
    threshold: float | None


def nearness(layer: Layer, folds: Sequence[Splits]) -> Nearness:
    """Compare test rows with the training rows of their fold, on a layer; of joined ones, on the deepest."""
    joined = {info.name for _, info in layer.parts}
    name = _deepest([name for file, _ in layer.parts for name in file.layers if name in joined])
    file, table = next(file for file, info in layer.parts if info.name == name), layer.table
    rows = table.rows[table.files.index(file)]
    images = UnitRows(file, name, rows)
    similarity = np.full(len(rows), np.nan, np.float32)
    tested = sum(len(fold.test) for fold in folds)
    for fold in folds:
        share = min(1, MOST_TESTED / tested)
        drawn = np.random.default_rng(0).permutation(fold.test)[: max(1, round(share * len(fold.test)))]
        learnt = UnitRows(file, name, rows[np.sort(np.concatenate([fold.train, fold.val]))])
        similarity[drawn] = np.minimum(nearest_rows(images.take(drawn), learnt, 1)[1][:, 0], 1)
    tested_rows = np.sort(np.concatenate([fold.test for fold in folds]))
    return Nearness(name, similarity[tested_rows], kept_threshold(file, name))


def leak_price(near: Nearness, predictions: Predictions) -> LeakPrice:
    """Return how the accuracy of `predictions` depends on how near the nearest training image is."""
    layer, similarity, threshold = near
    drawn = np.flatnonzero(~np.isnan(similarity))
    order = drawn[np.argsort(similarity[drawn], kind="stable")]
    bins = [_bin(part, similarity, predictions) for part in np.array_split(order, BINS) if len(part)]
    if threshold is None:
        return LeakPrice(layer, bins)
    far = predictions.right[drawn][similarity[drawn] < threshold - ROUNDING]
    return LeakPrice(layer, bins, threshold, len(drawn) - len(far), float(far.mean()) if len(far) else None)


def _bin(rows: IntArray, similarity: Float32Array, predictions: Predictions) -> NearnessBin:
    right = predictions.right[rows].astype(np.float64)
    effective = effective_rows(right, number_clusters(predictions.units[rows]))
    interval = accuracy_interval(float(right.mean()), len(right), effective)
    low, high = float(similarity[rows[0]]), float(similarity[rows[-1]])
    return NearnessBin(low, high, len(rows), float(right.mean()), interval)
