"""Are two sets of images, say training and field photos, of one domain? Frozen features assume it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features_cache import DONE, AmbiguousCacheError, CacheError, CacheFile, Catalog, digest_keys
from pipeline.arrays import IntArray
from pipeline.diagnostics.domain_test import FOLDS, domain_test
from pipeline.errors import FitError
from pipeline.evaluation.rows import not_finite, stands_for
from pipeline.results import DriftResult, ForeignImage
from pipeline.spec import DEFAULT_LAYER

MOST_ROWS = 1000
"""Images of each set that are compared; more are drawn by seed."""
MOST_FOREIGN = 10


@dataclass(frozen=True)
class _Images:
    """One row an image: equal images of a file count once."""

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
    """Test whether a classifier can tell the images of two caches apart, and name those it finds easiest.

    Images that stand in both are left out: none of them could be foreign, and none stands on both sides of a fold. Both
    sets then count alike: as many images of each are drawn as the smaller one has, at most 1,000.

    Parameters
    ----------
    first, second : str or Path
        Folders of cache files, or files. Labels are not needed.
    layer : str, default "penultimate"
        Name or alias of a layer that both hold, with the same fingerprint.
    backbone, pool : str, optional
        Select a file where a cache holds several.
    seed : int, default 0
        Draws images, folds and permutations.

    Raises
    ------
    CacheError
        If a cache or the layer cannot be found, or several files fit.
    FitError
        If the features are not comparable, not finite, or there are too few images.
    """
    catalogs = [Catalog(path) for path in (first, second)]
    held = [file for catalog in catalogs for file in catalog.fitting(backbone=backbone, pool=pool)]
    layer, *more = stands_for(held, layer)
    if more:
        raise FitError(f"one layer is compared, and these are several: {', '.join([layer, *more])}; name one with -l")
    files = [_find(catalog, layer, backbone, pool) for catalog in catalogs]
    _require_same_features(files[0], files[1], layer)
    sets = [_distinct(file) for file in files]
    shared = np.intersect1d(sets[0].keys, sets[1].keys)
    rng = np.random.default_rng(seed)
    own = [images.rows[~np.isin(images.keys, shared)] for images in sets]
    count = min(*map(len, own), MOST_ROWS)
    if count < FOLDS:
        found = " and ".join(f"{len(rows)} in {file.path.name}" for rows, file in zip(own, files, strict=True))
        raise FitError(f"a comparison takes at least {FOLDS} images of each set that the other lacks, got {found}")
    drawn = [np.sort(rng.choice(rows, count, replace=False)) for rows in own]
    features = [_features(file, layer, rows) for file, rows in zip(files, drawn, strict=True)]
    found_test = domain_test(features[0], features[1], seed)
    towards_own = found_test.scores * np.array([[-1.0], [1.0]])
    foreign = [
        [
            ForeignImage(str(file.uris[rows[place]]), float(scores[place]))
            for place in np.argsort(-scores)[:MOST_FOREIGN]
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
        accuracy=found_test.accuracy,
        p_value=found_test.p_value,
        foreign_in_first=foreign[0],
        foreign_in_second=foreign[1],
    )


def _find(catalog: Catalog, layer: str, backbone: str | None, pool: str | None) -> CacheFile:
    try:
        return catalog.find(layer=layer, backbone=backbone, pool=pool)
    except AmbiguousCacheError as error:
        raise AmbiguousCacheError(f"{error}; or name one of the files instead of the folder") from error


def _require_same_features(first: CacheFile, second: CacheFile, layer: str) -> None:
    if first.path.resolve() == second.path.resolve():
        raise CacheError(f"two sets of images are compared, but both caches are {first.path}; name two files")
    one, other = first.layer(layer), second.layer(layer)
    if one.fingerprint != other.fingerprint:
        differ = [f"{key} {one.spec.get(key)} and {other.spec.get(key)}" for key in _changed(one.spec, other.spec)]
        raise FitError(
            f"features of {layer} can be compared only if they were made alike, but these differ in "
            f"{'; '.join(differ) or 'their fingerprints'}; extract one of the sets again with the other's options"
        )


def _changed(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [key for key in dict.fromkeys([*one, *other]) if one.get(key) != other.get(key)]


def _distinct(file: CacheFile) -> _Images:
    done = np.flatnonzero(file.states == DONE)
    keys, places = np.unique(digest_keys(file.digests[done]), return_index=True)
    return _Images(file, done[places], keys)


def _features(file: CacheFile, layer: str, rows: IntArray) -> NDArray[np.float32]:
    features = np.asarray(file.matrix(layer)[rows], np.float32)
    bad = file.uris[rows[~np.isfinite(features).all(axis=1)]]
    if bad.size:
        raise not_finite(f"{layer} of {file.path.name}", bad, len(rows))
    return features
