"""What units see: the images that excite a channel most, cropped to where it looks, and the class that it prefers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from features_cache import DONE, CacheFile, Catalog, digest_keys
from pipeline.arrays import Float32Array, IntArray
from pipeline.diagnostics.selectivity import Selectivity, selectivity
from pipeline.errors import FitError, SourceError, UnreadableImageError
from pipeline.evaluation.rows import check_readable, not_finite, stands_for
from pipeline.extraction.object_store import open_catalog
from pipeline.images.loader import digest_of
from pipeline.images.resize import prepare
from pipeline.images.sources.registry import ImageSource, open_source
from pipeline.neighbours.rows import missing_notes
from pipeline.results import Progress, UnitExample, UnitResult, silent
from pipeline.spec import Preprocessing, parse_size

if TYPE_CHECKING:
    from pipeline.backbones.receptive_field import Box, Maximum

POOL, INPUT = "max", "input"
LEVEL = 0.05
"""A unit is called selective up to this adjusted p-value."""
SHOWN = 8
"""Units that are shown of each layer if none are named."""
EXAMPLES = 8
"""Images that are shown of each unit."""
MOST_UNITS = 128
"""Most units on a page, so that it stays small."""
MOST_ROWS = 4096
"""Images in the test of selectivity; of more so many are drawn by seed."""


@dataclass(frozen=True, eq=False)
class UnitsReport:
    """What was found.

    Parameters
    ----------
    backbone, source : str
        Handles.
    layers : dict of str to dict
        By name of the layer: ``channels``, ``silent`` ones (the same in all images), and how many are ``selective``
        (p <= 0.05, over the units of all layers together); None without classes.
    units : list of UnitResult
        By layer; of each class the most selective first, then of each the second, and so on.
    crops : list of list of (k, k, 3) uint8
        Of each unit's examples, in the same order.
    images : int
        Different images among which the examples were looked for.
    notes : list of str
    """

    backbone: str
    source: str
    layers: dict[str, dict[str, int | None]]
    units: list[UnitResult]
    crops: list[list[NDArray[np.uint8]]]
    images: int
    notes: list[str]


def units(
    cache: str | Path | Catalog,
    layers: Sequence[str],
    channels: Sequence[int] | None = None,
    source: str | None = None,
    backbone: str | None = None,
    seed: int = 0,
    *,
    images: str | Path | ImageSource | None = None,
    progress: Progress | None = None,
) -> UnitsReport:
    """Find the most selective channels of layers, the images that excite them most, and where they look in these.

    Parameters
    ----------
    cache : str, Path or Catalog
        A folder of cache files, or one file, with features that were extracted with pool ``max``.
    layers : sequence of str
        Names or aliases.
    channels : sequence of int, optional
        Numbers of the channels to show of each layer, from 0; by default `SHOWN` selective ones, the best of each
        class first or, without classes, those whose highest images stand out most.
    source, backbone : str, optional
        Which, if the cache holds several.
    seed : int, default 0
        Draws the permutations.
    images : str, Path or ImageSource, optional
        Where the images are by now, if not where they were extracted.
    progress : callable, optional
        Called as ``progress(done, total, text)``.

    Raises
    ------
    CacheError
        If a layer was not extracted with pool ``max``, or several files fit.
    FitError
        If there are too few images, a channel does not exist, or too many would be shown.
    BackboneError
        If the network does not load, or has other weights by now.

    Examples
    --------
    ::

        for unit in units("cache", ["blocks.4"]).units:
            print(unit.channel, unit.prefers, unit.auc, unit.examples[0].uri)
    """
    from pipeline.backbones.receptive_field import find_maxima
    from pipeline.backbones.registry import load_backbone

    catalog = open_catalog(cache)
    files = _files(catalog, layers, source, backbone)
    first = next(iter(files.values()))
    rows = _distinct(first)
    features = {name: _features(file, name, rows) for name, file in files.items()}
    notes = missing_notes(*files.values())
    tested = _tested(features, first, rows, seed, notes)
    parts = _parts(tested, features)
    chosen = {name: _choose(features[name], parts.get(name), channels, name) for name in features}
    if (total := sum(map(len, chosen.values()))) > MOST_UNITS:
        raise FitError(f"expected at most {MOST_UNITS} units on a page, got {total}; name fewer layers or channels")
    spec = first.layers[next(iter(files))].spec
    preprocessing = Preprocessing.from_json(spec["preprocessing"])
    loaded = load_backbone(str(first.request["backbone"]), parse_size(preprocessing.size), preprocessing.white)
    if loaded.weights_digest != spec["weights_digest"]:
        raise FitError(f"{loaded.handle} has other weights than those that {first.path.name} was made with")
    pixels = _Pixels(open_source(first.handles["location"] if images is None else images), preprocessing, first)
    found, crops = [], []
    for done, (name, matrix) in enumerate(features.items()):
        (progress or silent)(done, len(features), f"look at {name}")
        strongest = rows[np.argsort(-matrix[:, chosen[name]], 0, kind="stable")[:EXAMPLES]].T  # (units, examples)
        seen = np.stack([pixels.of(row) for row in strongest.ravel().tolist()])
        maxima = find_maxima(loaded, name, seen, np.repeat(chosen[name], strongest.shape[1]))
        examples = [_example(first, row, one) for row, one in zip(strongest.ravel().tolist(), maxima, strict=True)]
        cropped = [_cropped(one, maximum.box) for one, maximum in zip(seen, maxima, strict=True)]
        for index, channel in enumerate(chosen[name].tolist()):
            own = slice(index * strongest.shape[1], (index + 1) * strongest.shape[1])
            found.append(_unit(name, channel, parts.get(name), first, examples[own]))
            crops.append(cropped[own])
    (progress or silent)(len(features), len(features), "look at units")
    counts = {name: _counts(matrix, parts.get(name)) for name, matrix in features.items()}
    return UnitsReport(loaded.handle, first.handles["source"], counts, found, crops, len(rows), notes)


class _Pixels:
    """The network's inputs, by row; each image is decoded once."""

    def __init__(self, images: ImageSource, preprocessing: Preprocessing, file: CacheFile) -> None:
        self._images, self._preprocessing, self._file = images, preprocessing, file
        self._items = {item.uri: item for item in images.items}
        self._kept: dict[int, NDArray[np.uint8]] = {}

    def of(self, row: int) -> NDArray[np.uint8]:
        """Return the pixels (h, w, 3) of a row; raises `SourceError` if the image is gone or has other bytes."""
        if row not in self._kept:
            uri = str(self._file.uris[row])
            try:
                data = self._images.read(self._items[uri])
                if digest_of(data) != self._file.digests[row].tobytes():
                    raise UnreadableImageError("it has other bytes")
                self._kept[row] = prepare(data, self._preprocessing)
            except (UnreadableImageError, KeyError) as error:
                why = "it is not there" if isinstance(error, KeyError) else error
                raise SourceError(f"{uri} changed since it was extracted: {why}; extract again") from error
        return self._kept[row]


def _files(catalog: Catalog, layers: Sequence[str], source: str | None, backbone: str | None) -> dict[str, CacheFile]:
    """Return the file of each layer; all are of one source and network, with the same rows."""
    if not layers:
        raise FitError("no layer was asked for; name one, such as blocks.4")
    held = [file for file in catalog.files if file.handles.get("pool") == POOL]
    if not held:
        raise FitError(f"{catalog.path} holds no layer with pool {POOL}, which units needs; extract with pool {POOL}")
    catalog = catalog.only(held)
    fitting = catalog.fitting(source=source, backbone=backbone)
    names = list(dict.fromkeys(name for layer in layers for name in stands_for(fitting, layer)))
    files = {name: catalog.find(layer=name, source=source, backbone=backbone) for name in names}
    first = files[names[0]]
    catalog.check_source(first)
    for name, file in files.items():
        if name == INPUT:
            raise FitError(f"the layer {INPUT} has no units; name a layer of the network")
        one, other = (one.layers[at].spec for one, at in ((file, name), (first, names[0])))
        same = all(one[key] == other[key] for key in ("backbone", "weights_digest", "preprocessing"))
        if not (same and np.array_equal(file.digests, first.digests) and np.array_equal(file.states, first.states)):
            raise FitError(
                f"{file.path.name} and {first.path.name} are not of the same network and images; name one backbone, "
                "or run the same extract again"
            )
    return files


def _distinct(file: CacheFile) -> IntArray:
    """Return the rows of different images that are done."""
    file.check_columns()
    check_readable(file)
    done = np.flatnonzero(file.states == DONE)
    _, index = np.unique(digest_keys(file.digests[done]), return_index=True)
    if len(index) < 2:
        raise FitError(f"units are told from several images, and {file.path.name} has {len(index)}; extract more")
    return np.sort(done[index])


def _features(file: CacheFile, layer: str, rows: IntArray) -> Float32Array:
    features = np.asarray(file.features(layer, rows), np.float32)
    bad = file.uris[rows[~np.isfinite(features).all(axis=1)]]
    if bad.size:
        raise not_finite(layer, bad, len(rows), {str(file.layers[layer].spec.get("precision"))})
    return features


def _tested(
    features: Mapping[str, Float32Array], file: CacheFile, rows: IntArray, seed: int, notes: list[str]
) -> Selectivity | None:
    """Test the units of all layers together; None without two classes."""
    labelled = np.flatnonzero(file.labels[rows] >= 0)
    drawn = len(labelled) > MOST_ROWS
    if drawn:
        labelled = np.sort(np.random.default_rng(seed).choice(labelled, MOST_ROWS, replace=False))
    kept = rows[labelled]
    if len(np.unique(file.labels[kept])) < 2:
        notes.append("without two classes no selectivity: units are ordered by how far their images stand out")
        return None
    if drawn:
        notes.append(f"selectivity is tested on {MOST_ROWS} images, drawn by seed")
    tested = np.concatenate([matrix[labelled] for matrix in features.values()], 1)
    return selectivity(tested, np.asarray(file.labels[kept]), file.groups[kept], seed)


def _parts(tested: Selectivity | None, features: Mapping[str, Float32Array]) -> dict[str, Selectivity]:
    """Return the part of each layer in a test of all; empty without one."""
    if tested is None:
        return {}
    ends = np.cumsum([matrix.shape[1] for matrix in features.values()])[:-1]
    columns = [np.split(getattr(tested, one.name), ends) for one in fields(Selectivity)]
    return {name: Selectivity(*parts) for name, *parts in zip(features, *columns, strict=True)}


def _choose(features: Float32Array, tested: Selectivity | None, channels: Sequence[int] | None, layer: str) -> IntArray:
    """Return the channels to show: of each class the most selective first, then of each the second, and so on.

    Channels that are not selective come last.
    """
    if channels is not None and len(channels):
        if wrong := [one for one in channels if not 0 <= one < features.shape[1]]:
            raise FitError(f"{layer} has the channels 0 to {features.shape[1] - 1}, not {wrong[0]}")
        return np.array(list(dict.fromkeys(channels)), np.int64)
    spread = features.std(0)
    alive = np.flatnonzero(spread > 0)
    if not len(alive):
        raise FitError(f"each channel of {layer} is the same in all images; name another layer")
    if tested is None:
        highest = np.sort(features[:, alive], 0)[-EXAMPLES:].mean(0) - features[:, alive].mean(0)
        return np.asarray(alive[np.argsort(-highest / spread[alive], kind="stable")][:SHOWN])
    turns: Counter[int] = Counter()
    order = []
    for channel in alive[np.argsort(-tested.statistic[alive], kind="stable")].tolist():
        label = int(tested.label[channel])
        chance = bool(tested.p_value[channel] > LEVEL)
        order.append((chance, turns[label], -tested.statistic[channel], channel))
        turns[label] += 1
    return np.array([channel for *_, channel in sorted(order)[:SHOWN]], np.int64)


def _example(file: CacheFile, row: int, maximum: Maximum) -> UnitExample:
    number = int(file.labels[row])
    label = file.classes[number] if number >= 0 else None
    return UnitExample(str(file.uris[row]), label, maximum.activation, maximum.box)


def _unit(
    layer: str, channel: int, tested: Selectivity | None, file: CacheFile, examples: list[UnitExample]
) -> UnitResult:
    if tested is None:
        return UnitResult(layer, channel, None, None, None, None, examples)
    prefers = file.classes[int(tested.label[channel])]
    auc, statistic, p = (float(column[channel]) for column in (tested.auc, tested.statistic, tested.p_value))
    return UnitResult(layer, channel, prefers, auc, statistic, p, examples)


def _counts(features: Float32Array, tested: Selectivity | None) -> dict[str, int | None]:
    constant = int((features == features[0]).all(0).sum())
    selective = None if tested is None else int((tested.p_value <= LEVEL).sum())
    return {"channels": features.shape[1], "silent": constant, "selective": selective}


def _cropped(pixels: NDArray[np.uint8], box: Box) -> NDArray[np.uint8]:
    return pixels[box.top : box.bottom, box.left : box.right]
