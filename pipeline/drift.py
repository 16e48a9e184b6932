"""Test whether two sets of images, such as training and field photos, are of one domain, as frozen features assume."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from features_cache import DONE, AmbiguousCacheError, CacheFile, Catalog, digest_keys
from pipeline.arrays import IntArray
from pipeline.diagnostics.domain_test import FOLDS, domain_test
from pipeline.errors import FitError
from pipeline.evaluation.rows import not_finite
from pipeline.extraction.object_store import open_catalog
from pipeline.neighbours.rows import missing_notes, one_layer, require_same_features
from pipeline.results import DriftResult, ForeignImage
from pipeline.spec import DEFAULT_LAYER

MOST_ROWS = 1000
"""Images of each set that are compared; from a larger set so many are drawn by seed."""
MOST_FOREIGN = 10


@dataclass(frozen=True)
class _Images:
    """The distinct images of a file: one row and one key for each."""

    file: CacheFile
    rows: IntArray
    keys: NDArray[np.bytes_]


def drift(
    first: str | Path,
    second: str | Path,
    layer: str = DEFAULT_LAYER,
    backbone: str | None = None,
    pool: str | None = None,
    seed: int = 0,
) -> DriftResult:
    """Test whether a classifier can tell the images of two caches apart, and name the images it finds easiest.

    Images that are in both caches are left out, because they belong to both sets and would be on both sides of a fold.
    Of the others, equally many are drawn from each set: as many as the smaller set has, at most 1,000.

    Parameters
    ----------
    first, second : str or Path
        Folders of cache files, or files. They need no labels.
    layer : str, default "penultimate"
        Name or alias of one layer that both hold, with the same fingerprint.
    backbone, pool : str, optional
        Select a file if a cache holds several.
    seed : int, default 0
        Draws images, folds and permutations.

    Raises
    ------
    CacheError
        If a cache or the layer cannot be found, or several files fit.
    FitError
        If the features are not comparable or not finite, or there are too few images.

    Examples
    --------
    ::

        found = drift("training-cache", "field-cache")
        print(found.accuracy, found.p_value, found.foreign_in_second[0].uri)
    """
    catalogs = [open_catalog(path) for path in (first, second)]
    held = [file for catalog in catalogs for file in catalog.fitting(backbone=backbone, pool=pool)]
    layer = one_layer(held, layer)
    files = [_find(catalog, layer, backbone, pool) for catalog in catalogs]
    require_same_features(files[0], files[1], layer)
    sets = [_distinct(file) for file in files]
    shared = np.intersect1d(sets[0].keys, sets[1].keys)
    rng = np.random.default_rng(seed)
    own = [images.rows[~np.isin(images.keys, shared)] for images in sets]
    count = min(*map(len, own), MOST_ROWS)
    if count < FOLDS:
        found = " and ".join(f"{len(rows)} in {file.path.name}" for rows, file in zip(own, files, strict=True))
        raise FitError(f"a comparison needs at least {FOLDS} images of each set that the other lacks, got {found}")
    drawn = [np.sort(rng.choice(rows, count, replace=False)) for rows in own]
    features = [_features(file, layer, rows) for file, rows in zip(files, drawn, strict=True)]
    tested = domain_test(features[0], features[1], seed)
    towards_own = tested.scores * np.array([[-1.0], [1.0]])
    foreign = [
        [
            ForeignImage(str(file.uris[rows[index]]), float(scores[index]))
            for index in np.argsort(-scores)[:MOST_FOREIGN]
        ]
        for file, rows, scores in zip(files, drawn, towards_own, strict=True)
    ]
    return DriftResult(
        first=str(files[0].path),
        second=str(files[1].path),
        layer=layer,
        images=[len(images.rows) for images in sets],
        shared=len(shared),
        compared=count,
        accuracy=tested.accuracy,
        p_value=tested.p_value,
        foreign_in_first=foreign[0],
        foreign_in_second=foreign[1],
        notes=missing_notes(*files),
    )


def _find(catalog: Catalog, layer: str, backbone: str | None, pool: str | None) -> CacheFile:
    try:
        return catalog.find(layer=layer, backbone=backbone, pool=pool)
    except AmbiguousCacheError as error:
        raise AmbiguousCacheError(f"{error}; or name one of the files instead of the folder") from error


def _distinct(file: CacheFile) -> _Images:
    file.check_columns()
    done = np.flatnonzero(file.states == DONE)
    keys, first = np.unique(digest_keys(file.digests[done]), return_index=True)
    return _Images(file, done[first], keys)


def _features(file: CacheFile, layer: str, rows: IntArray) -> NDArray[np.float32]:
    features = np.asarray(file.features(layer, rows), np.float32)
    bad = file.uris[rows[~np.isfinite(features).all(axis=1)]]
    if bad.size:
        raise not_finite(
            f"{layer} of {file.path.name}", bad, len(rows), {str(file.layers[layer].spec.get("precision"))}
        )
    return features
