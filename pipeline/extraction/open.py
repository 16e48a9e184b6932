"""The cache files that a request needs: those that lack rows, opened for writing, and new ones for the rest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from features_cache import (
    PENDING,
    CacheError,
    CacheFile,
    CacheWriter,
    LayerInfo,
    Rows,
    drop_redundant,
    file_name,
    grow,
    open_cache,
    same_listing,
    same_rows,
)
from pipeline.arrays import BoolArray
from pipeline.errors import BackboneError, ModelFileError
from pipeline.extraction.extractor import FeatureExtractor
from pipeline.extraction.lookup import check_specs, find_answer, find_holder, is_complete, older_fingerprints
from pipeline.images.sources.registry import ImageSource
from pipeline.spec import DECODE_POLICY, LayerSpec, Request, fingerprint_of, is_outdated

if TYPE_CHECKING:
    from pipeline.backbones.taps import TappedNetwork
    from pipeline.engines.engine import Engine


@dataclass(frozen=True, eq=False)
class Destination:
    """A cache folder, and the rows of a source that its files are to have.

    Parameters
    ----------
    images : ImageSource
    rows : Rows
        All images of the source.
    asked : (n,) bool
        Which rows are to be computed; the others stay as they are.
    folder : Path
    files : sequence of CacheFile
        Those in `folder` that hold images of this source.
    rehash : bool
        Read every image again, even if its file looks unchanged.
    """

    images: ImageSource
    rows: Rows
    asked: BoolArray
    folder: Path
    files: Sequence[CacheFile]
    rehash: bool

    def has_rows_of(self, file: CacheFile) -> bool:
        """Tell whether `file` has exactly these rows."""
        return same_rows(file, self.rows, self.images.classes)

    def has_all_of(self, file: CacheFile) -> bool:
        """Tell whether nothing is left to do for `file`: it has exactly these rows, and none of `asked` is pending."""
        return not (self.rehash or is_outdated(file)) and is_complete(file, self.rows, self.images.classes, self.asked)

    def find_complete(self, request: Request) -> dict[str, CacheFile] | None:
        """Return the file of each layer of `request`, or None if a layer has none or a file is not complete."""
        answer = None if self.rehash else find_answer(self.files, request)
        return answer if answer is not None and all(map(self.has_all_of, answer.values())) else None


class Opened(NamedTuple):
    """A cache file open for writing; `results` are those of the engine that go into it, a layer each."""

    writer: CacheWriter
    engine: Engine
    results: slice


def open_files(
    destination: Destination, extractor: FeatureExtractor, expect: Sequence[LayerSpec] | None
) -> Iterator[CacheFile | Opened]:
    """Yield what holds the layers of an extractor's requests: files that are complete, and the others, opened.

    Those of the same layers and precision with different poolings share an engine, which gives all of them in one pass.

    Parameters
    ----------
    destination : Destination
    extractor : FeatureExtractor
    expect : sequence of LayerSpec, optional
        See `check_expected`.
    """
    needed = [one for request in extractor.requests for one in _needed(request, destination, extractor, expect)]
    pools: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for one in needed:
        if isinstance(one, _Lacking):
            pools[one.sharing].append(one.request.pool)
    for one in needed:
        if isinstance(one, CacheFile):
            yield one
            continue
        layers, asked = tuple(one.layers), tuple(pools[one.sharing])
        engine = extractor.engine(
            layers, asked
        )  # first, so that a network that cannot run leaves all files as they are
        if one.file is None:
            writer = _create(one.layers, one.request, destination, extractor.aliases, extractor.tapped(layers, asked))
        else:
            writer = _continue(one.file, destination)
        start = asked.index(one.request.pool) * len(layers)
        yield Opened(writer, engine, slice(start, start + len(layers)))


class _Lacking(NamedTuple):
    """A file that lacks rows, or that is not there yet: then `file` is None."""

    request: Request
    layers: dict[str, LayerSpec]
    file: CacheFile | None

    @property
    def sharing(self) -> tuple[Any, ...]:
        """What files have in common whose features come from one pass."""
        return tuple(self.layers), next(iter(self.layers.values())).precision, self.request.view


def _needed(
    request: Request, destination: Destination, extractor: FeatureExtractor, expect: Sequence[LayerSpec] | None
) -> Iterator[CacheFile | _Lacking]:
    specs = {name: extractor.spec(name, request) for name in extractor.layers}
    check_expected(specs.values(), expect)
    files = [file for file in destination.files if not is_outdated(file) or _can_continue(file, request, extractor)]
    holders = {name: find_holder(files, spec) for name, spec in specs.items()}
    for file in dict.fromkeys(holder for holder in holders.values() if holder):
        if destination.has_all_of(file):
            yield file
        else:
            yield _Lacking(request, {name: LayerSpec.from_json(info.spec) for name, info in file.layers.items()}, file)
    missing = {name: spec for name, spec in specs.items() if holders[name] is None}
    if missing:
        yield _Lacking(request, missing, None)


def _can_continue(file: CacheFile, request: Request, extractor: FeatureExtractor) -> bool:
    """Tell whether all layers of a file of older decoding rules are otherwise what they would be today."""
    try:
        specs = [extractor.spec(name, request) for name in file.layers]
    except BackboneError:  # the file is of another network or pooling
        return False
    found = [info.fingerprint for info in file.layers.values()]
    return all(one in older_fingerprints(spec) for one, spec in zip(found, specs, strict=True))


def _continue(file: CacheFile, destination: Destination) -> CacheWriter:
    """Open a file that lacks rows, or that was made for other rows or by older decoding rules.

    The rows of older rules are not carried over: `CacheFiller` copies those that the rules of today leave as they are.
    """
    carry = not destination.rehash and not is_outdated(file)
    if carry and destination.has_rows_of(file):
        writer = CacheWriter.resume(file.path)
        if destination.has_rows_of(writer.cache):  # another process may have replaced the file before it was locked
            return writer
        writer.close()
    return _grow(file, [_of_today(info) for info in file.layers.values()], destination, carry=carry)


def _grow(file: CacheFile, layers: Sequence[LayerInfo], destination: Destination, **how: Any) -> CacheWriter:
    """Replace a file by one for the rows of `destination`; `how` as for `features_cache.grow`."""
    listing = destination.rows, destination.images.classes
    return grow(file.path, *listing, layers, file.handles, file.request, **how)


def _of_today(info: LayerInfo) -> LayerInfo:
    spec = replace(LayerSpec.from_json(info.spec), decode=DECODE_POLICY)
    return replace(info, spec=spec.to_json(), fingerprint=spec.fingerprint)


def _create(
    specs: dict[str, LayerSpec],
    request: Request,
    destination: Destination,
    aliases: dict[str, list[str]],
    tapped: TappedNetwork,
) -> CacheWriter:
    images, dims, shapes = destination.images, tapped.dims[request.pool], tapped.shapes[request.pool]
    layers = [
        LayerInfo(name, dims[name], spec.store, spec.to_json(), spec.fingerprint, shapes[name])
        for name, spec in specs.items()
    ]
    key = fingerprint_of([images.location, *(layer.fingerprint for layer in layers)])
    path = destination.folder / file_name(images.name, tapped.name, key)
    handles = {"source": images.name, "location": images.location, "backbone": tapped.name, "pool": request.pool}
    if request.view is not None:
        handles["view"] = f"{request.augment} {request.view}"
    if path.exists():  # another process made it since; a damaged file raises its own error
        made = open_cache(path)
        check_specs(made)
        same_layers = [info.fingerprint for info in made.layers.values()] == [info.fingerprint for info in layers]
        if made.handles != handles or not same_layers:
            raise CacheError(f"{path} holds other features than its name says; delete it and extract again")
        return _continue(made, destination)
    asked = request.to_json() | {"aliases": aliases}
    return CacheWriter.create(path, destination.rows, images.classes, layers, handles, asked)


def bring_up_to_date(destination: Destination, extracted: Sequence[CacheFile]) -> list[str]:
    """Give the other cache files of the source the rows of `destination`, with the features that they have.

    Nothing is computed: a row of which a file has no features is pending afterwards.

    Parameters
    ----------
    destination : Destination
    extracted : sequence of CacheFile
        Files with exactly these rows. Their digests tell which rows of the other files are still valid.

    Returns
    -------
    list of str
        Notes on what was changed, and on files that could not be.
    """
    if not extracted:
        return []
    own = {file.path for file in extracted}
    digests = np.zeros(extracted[0].digests.shape, np.uint8)
    for file in extracted:
        known = (file.states != PENDING) & file.digests.any(axis=1)
        digests[known] = file.digests[known]
    changed, notes = [], []
    for file in destination.files:
        try:
            if file.path in own or open_cache(file.path).header.line != file.header.line:
                continue  # another process has replaced it since this run began, and may know a later listing
            if not _is_behind(file, extracted[0], digests):
                continue
            with _grow(file, list(file.layers.values()), destination, digests=digests) as writer:
                pending = len(writer.pending())
            drop_redundant(file.path)
        except CacheError as error:
            notes.append(f"{file.path.name} could not be brought up to date: {error}")
        else:
            changed.append(file.path.name + (f" ({pending} rows left pending)" if pending else ""))
    if changed:
        notes.append(f"the source changed, so its other cache files were brought up to date: {', '.join(changed)}")
    return notes


def _is_behind(file: CacheFile, latest: CacheFile, digests: NDArray[np.uint8]) -> bool:
    """Tell whether a file's listing differs from that of `latest`, or the bytes of an image from `digests`."""
    if not same_listing(file, latest):
        return True
    rows = np.flatnonzero((file.states != PENDING) & (file.digests != digests).any(axis=1))
    return bool((file.digests[rows].any(axis=1) & digests[rows].any(axis=1)).any())


def check_expected(specs: Iterable[LayerSpec], expect: Sequence[LayerSpec] | None) -> None:
    """Raise `ModelFileError` if features differ from the expected ones in anything but precision."""
    for found, wanted in zip(specs, expect or (), strict=False):
        if replace(found, precision=wanted.precision) != wanted:
            old, new = wanted.to_json(), found.to_json()
            changed = ", ".join(key for key in old | new if old.get(key) != new.get(key) and key != "precision")
            raise ModelFileError(
                f"the model was trained on other features of {wanted.backbone} {wanted.layer}: {changed} differ here; "
                "use the weights and versions it was trained with, or train it again"
            )
