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
    PLAN_SUFFIX,
    CacheError,
    CacheFile,
    CacheWriter,
    LayerInfo,
    PartedCache,
    PartPlan,
    Rows,
    divide,
    drop_redundant,
    explained,
    file_name,
    grow,
    open_cache,
    open_plan,
    same_listing,
    same_rows,
    store_of,
)
from pipeline.arrays import BoolArray
from pipeline.errors import BackboneError, ModelFileError
from pipeline.extraction.extractor import FeatureExtractor
from pipeline.extraction.fill import Opened
from pipeline.extraction.lookup import (
    check_specs,
    find_answer,
    find_holder,
    has_other_bytes,
    is_complete,
    older_fingerprints,
)
from pipeline.extraction.parts import check_stored, follow_source, most_rows
from pipeline.images.sources.registry import ImageSource
from pipeline.spec import DECODE_POLICY, LayerSpec, Request, fingerprint_of, is_outdated

if TYPE_CHECKING:
    from pipeline.backbones.taps import TappedNetwork


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
        Read every image that is asked for again, even if its file looks unchanged.
    part_rows : int, optional
        New caches of more rows than this are made in parts; 0 stands for the default of `most_rows`. By default none
        are.
    whole : bool
        Whether files that are not in parts are written, too.
    """

    images: ImageSource
    rows: Rows
    asked: BoolArray
    folder: Path
    files: Sequence[CacheFile]
    rehash: bool
    part_rows: int | None = None
    whole: bool = True

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


def open_files(
    destination: Destination, extractor: FeatureExtractor, expect: Sequence[LayerSpec] | None
) -> Iterator[CacheFile | PartPlan | Opened]:
    """Yield what holds the layers of an extractor's requests: files that are complete, and the others, opened.

    Those of the same layers and precision with different poolings share an engine, which gives all of them in one pass.
    A cache in parts that is not complete is given as its plan.

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
        if not isinstance(one, _Lacking):
            yield one
            continue
        layers, asked = tuple(one.layers), tuple(pools[one.sharing])
        # the engine first, so that a network that cannot run leaves all files as they are
        engine = extractor.engine(layers, asked)
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
) -> Iterator[CacheFile | PartPlan | _Lacking]:
    specs = {name: extractor.spec(name, request) for name in extractor.layers}
    check_expected(specs.values(), expect)
    files = [file for file in destination.files if not is_outdated(file) or _can_continue(file, request, extractor)]
    holders = {name: find_holder(files, spec) for name, spec in specs.items()}
    for file in dict.fromkeys(holder for holder in holders.values() if holder):
        if destination.has_all_of(file):
            yield file
        elif isinstance(file, PartedCache):
            yield _refit(file.plan, destination)
        elif destination.whole:
            if not _can_continue(file, request, extractor):  # one column must not mean two things
                raise CacheError(
                    f"{file.path} lacks rows, and holds layers that this version computes differently: "
                    f"{', '.join(file.layers)}; move it elsewhere and extract the layers that you need again"
                )
            yield _Lacking(request, {name: LayerSpec.from_json(info.spec) for name, info in file.layers.items()}, file)
    missing = {name: spec for name, spec in specs.items() if holders[name] is None}
    if missing and (plan := _plan_parts(missing, request, destination, extractor)) is not None:
        yield plan
    elif missing and destination.whole:
        yield _Lacking(request, missing, None)


def _can_continue(file: CacheFile, request: Request, extractor: FeatureExtractor) -> bool:
    """Tell whether all layers of a file are what they would be today, apart from the decoding rules."""
    try:
        specs = [extractor.spec(name, request) for name in file.layers]
    except BackboneError:  # the file is of another network or pooling, or its layers have other names now
        return False
    found = [info.fingerprint for info in file.layers.values()]
    return all(one in (spec.fingerprint, *older_fingerprints(spec)) for one, spec in zip(found, specs, strict=True))


def _continue(file: CacheFile, destination: Destination) -> CacheWriter:
    """Open a file that lacks rows, or that was made for other rows or by older decoding rules.

    The rows of older rules are not carried over: `CacheFiller` copies those that the rules of today leave as they are.
    """
    outdated = is_outdated(file)
    if not destination.rehash and not outdated and destination.has_rows_of(file):
        writer = CacheWriter.resume(file.path)
        if destination.has_rows_of(writer.cache):  # another process may have replaced the file before it was locked
            return writer
        writer.close()
    carry = np.full(len(destination.rows), not outdated)
    if destination.rehash:
        carry &= ~destination.asked
    return _grow(file, [_of_today(info) for info in file.layers.values()], destination, carry=carry)


def _refit(plan: PartPlan, destination: Destination) -> PartPlan:
    """Return a plan for the present rows and decoding rules, which is written if it differs."""
    fitted = replace(plan.fitted(destination.rows.uris), layers=tuple(map(_of_today, plan.layers)))
    ranges, fitted_ranges = ([(part.number, part.first) for part in one.parts] for one in (plan, fitted))
    if (fitted.layers, fitted_ranges) == (plan.layers, ranges) or fitted.rewrite():
        return fitted
    return _refit(open_plan(plan.path), destination)


def _grow(file: CacheFile, layers: Sequence[LayerInfo], destination: Destination, **how: Any) -> CacheWriter:
    """Replace a file by one for the rows of `destination`; `how` as for `features_cache.grow`."""
    listing = destination.rows, destination.images.classes
    return grow(file.path, *listing, layers, file.handles, file.request, **how)


def _of_today(info: LayerInfo) -> LayerInfo:
    spec = replace(LayerSpec.from_json(info.spec), decode=DECODE_POLICY)
    return replace(info, spec=spec.to_json(), fingerprint=spec.fingerprint)


def _plan_parts(
    specs: dict[str, LayerSpec], request: Request, destination: Destination, extractor: FeatureExtractor
) -> PartPlan | None:
    """Return the plan of a new cache in parts, which is written unless there is one; None if it is to be one file.

    In an object store, a cache has a plan even if that has one part.
    """
    stored = store_of(destination.folder) is not None
    if destination.part_rows is None and not stored:
        return None
    tapped = extractor.tapped(tuple(specs), (request.pool,))
    layers = _layers(specs, request, tapped)
    most, uris = most_rows(layers, destination.part_rows), destination.rows.uris
    if len(uris) <= most and not stored:
        return None
    if stored:
        check_stored(layers, min(most, len(uris)))
    # the name leaves out what auto stands for here, so that machines of other precisions take one plan
    as_asked = [replace(spec, precision=request.precision).fingerprint for spec in specs.values()]
    path = _path(destination, tapped, as_asked).with_suffix(PLAN_SUFFIX)
    handles, asked = _handles(destination, request, tapped), request.to_json() | {"aliases": extractor.aliases}
    pinned = {"engine": extractor.engine_name(request.pool)}
    with explained(path, "write"):
        destination.folder.mkdir(parents=True, exist_ok=True)
    return _refit(PartPlan(path, layers, handles, asked, pinned, most, divide(uris, most)).publish(), destination)


def _create(
    specs: dict[str, LayerSpec],
    request: Request,
    destination: Destination,
    aliases: dict[str, list[str]],
    tapped: TappedNetwork,
) -> CacheWriter:
    layers, handles = _layers(specs, request, tapped), _handles(destination, request, tapped)
    path = _path(destination, tapped, [layer.fingerprint for layer in layers])
    if path.exists():  # another process made it since; a damaged file raises its own error
        made = open_cache(path)
        check_specs(made)
        same_layers = [info.fingerprint for info in made.layers.values()] == [info.fingerprint for info in layers]
        if made.handles != handles or not same_layers:
            raise CacheError(f"{path} holds other features than its name says; delete it and extract again")
        return _continue(made, destination)
    asked = request.to_json() | {"aliases": aliases}
    return CacheWriter.create(path, destination.rows, destination.images.classes, layers, handles, asked)


def _layers(specs: dict[str, LayerSpec], request: Request, tapped: TappedNetwork) -> tuple[LayerInfo, ...]:
    dims, shapes = tapped.dims[request.pool], tapped.shapes[request.pool]
    return tuple(
        LayerInfo(name, dims[name], spec.store, spec.to_json(), spec.fingerprint, shapes[name])
        for name, spec in specs.items()
    )


def _path(destination: Destination, tapped: TappedNetwork, fingerprints: Sequence[str]) -> Path:
    key = fingerprint_of([destination.images.location, *fingerprints])
    return destination.folder / file_name(destination.images.name, tapped.name, key)


def _handles(destination: Destination, request: Request, tapped: TappedNetwork) -> dict[str, str]:
    images = destination.images
    handles = {"source": images.name, "location": images.location, "backbone": tapped.name, "pool": request.pool}
    if request.view is not None:
        handles["view"] = f"{request.augment} {request.view}"
    return handles


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
            if isinstance(file, PartedCache):
                pending = follow_source(_refit(file.plan, destination), destination.images, digests)
                if open_cache(file.path).header.line == file.header.line:
                    continue  # only parts are missing
            else:
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
    return not same_listing(file, latest) or has_other_bytes(file, digests)


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
