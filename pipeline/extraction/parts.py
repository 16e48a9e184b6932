"""Extract a source in parts: plan them, and fill each in a file of its own, in any process, at any time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from features_cache import (
    CacheError,
    CacheFile,
    DamagedCacheError,
    LayerInfo,
    Part,
    PartPlan,
    begin_try,
    drop_tries,
    etag_of,
    open_cache,
    open_part,
    open_plan,
    publish_try,
    same_rows,
    store_of,
    superseded_files,
    tries_of,
)
from pipeline.arrays import BoolArray
from pipeline.errors import BackboneError, EngineError, SourceError
from pipeline.extraction.extractor import FeatureExtractor
from pipeline.extraction.fill import CacheFiller, Clock, Opened, fill
from pipeline.extraction.lookup import has_other_bytes, is_complete, rows_of
from pipeline.extraction.object_store import local_path
from pipeline.images.sources.registry import ImageSource, Items, open_source
from pipeline.results import Progress
from pipeline.spec import LONGEST_SIDE, LayerSpec, Request, View, parse_size

MOST_ROWS = 262_144
MOST_BYTES = 512_000_000
"""A part has at most so many rows, and so many bytes of features, unless the user sets the number of rows."""

MOST_STORED_BYTES = 2_000_000_000
"""A part in an object store has at most so many bytes: S3 takes 5 GB in one request, and a part may double."""

_OTHER_ROW_BYTES = 1_000
"""What a row takes beside its features, with a long name."""


@dataclass(frozen=True)
class Computing:
    """How to compute: what may differ between the processes that fill one cache, as for `pipeline.extract.extract`."""

    engine: str = "auto"
    device: str = "auto"
    batch_size: int | None = None
    workers: int | None = None
    on_error: str = "skip"
    rehash: bool = False


@dataclass(eq=False)
class FilledParts:
    """Some parts of the plan at `path` after a call: what was computed, and what the user should know."""

    path: Path
    rows: int = 0
    computed: int = 0
    few_levels: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    clock: Clock = field(default_factory=Clock)

    @cached_property
    def file(self) -> CacheFile:
        """The whole cache in parts, opened when all is done."""
        return open_cache(self.path)

    def add(self, other: FilledParts) -> None:
        """Add what was done in another call, which ran after this one or beside it."""
        self.rows += other.rows
        self.computed += other.computed
        self.few_levels += other.few_levels
        self.seconds += other.seconds
        self.notes = list(dict.fromkeys([*self.notes, *other.notes]))
        for name, seconds in vars(other.clock).items():
            setattr(self.clock, name, getattr(self.clock, name) + seconds)


def parse_share(part: str | None) -> tuple[int, int]:
    """Return index, from 0, and count of ``"3/64"``; the only share of one where nothing was given.

    Examples
    --------
    >>> parse_share("3/64"), parse_share(None)
    ((2, 64), (0, 1))
    """
    if part is None:
        return 0, 1
    try:
        index, count = map(int, part.split("/"))
        if not 1 <= index <= count:
            raise ValueError
    except ValueError:
        raise SourceError(f"part: expected a share such as 3/64, the third of 64, got {part!r}") from None
    return index - 1, count


def most_rows(layers: Sequence[LayerInfo], asked: int | None) -> int:
    """Return how many rows a part of these layers has at most; `asked` by the user, if not None."""
    return asked or max(1, min(MOST_ROWS, MOST_BYTES // sum(layer.row_bytes for layer in layers)))


def check_stored(layers: Sequence[LayerInfo], rows: int) -> None:
    """Raise `CacheError` if a part of so many rows is too large for an object store."""
    each = _OTHER_ROW_BYTES + sum(layer.row_bytes for layer in layers)
    if rows * each > MOST_STORED_BYTES:
        raise CacheError(
            f"a part of {rows:,} rows would take {rows * each / 1e9:.1f} GB, and in an object store at most "
            f"{MOST_STORED_BYTES / 1e9:.0f} GB; let parts have at most {MOST_STORED_BYTES // each:,} rows (--part-rows)"
        )


def slice_source(images: ImageSource, where: slice) -> ImageSource:
    """Return a range of a source's items as a source of its own, with the classes that occur in it."""
    rows = images.items[where].rows
    found = np.unique(rows.labels)
    labels = np.searchsorted(found[found >= 0], rows.labels) - (rows.labels < 0)
    classes = tuple(images.classes[label] for label in found[found >= 0].tolist())
    return replace(images, items=Items(replace(rows, labels=labels)), classes=classes)


class PartFiller:
    """Fills parts of one plan from one listing of its source, with a network that is loaded when it is needed.

    Parameters
    ----------
    plan : PartPlan
    images : ImageSource
        The source, of which the parts to be filled must be listed.
    computing : Computing
    extractor : FeatureExtractor, optional
        The network, if it is loaded already.
    """

    def __init__(
        self, plan: PartPlan, images: ImageSource, computing: Computing, extractor: FeatureExtractor | None = None
    ) -> None:
        self.plan, self.extractor = plan, extractor
        self._images, self._computing = images, computing
        self._where = {part.number: where for part, where in plan.ranges(images.items.rows.uris)}

    def lists(self, number: int) -> bool:
        """Tell whether the images of a part were listed; raises `CacheError` if there is no such part."""
        wanted, within = self.plan.range_of(number), self._images.within
        return within is None or within.covers(wanted)

    def rows_of(self, only: Sequence[str] | None) -> BoolArray | None:
        """Return which rows of the source, (n,), have one of these uris; None for all."""
        return None if only is None else np.isin(self._images.items.rows.uris, only)

    def fill_share(self, asked: BoolArray, share: tuple[int, int], progress: Progress) -> FilledParts:
        """Fill each part whose place in the plan leaves the index of `share` when divided by its count.

        Parameters
        ----------
        asked : (n,) bool
            Rows of the source that may be computed.
        share : tuple of int
            Index and count.
        progress : callable
        """
        index, count = share
        parts = self.plan.parts[index::count]
        total = sum(int(asked[self._where[part.number]].sum()) for part in parts)
        done = FilledParts(self.plan.path)
        for part in sorted(parts, key=_taking_first):

            def report(handled: int, _: int, text: str, state: str = "", before: int = done.rows) -> None:
                progress(before + handled, total, text, state)

            done.add(self.fill(part.number, asked, report))
        return done

    def fill(self, number: int, asked: BoolArray | None, progress: Progress) -> FilledParts:
        """Bring one part up to date with the listing and publish it, unless it is complete.

        Parameters
        ----------
        number : int
            Of the part.
        asked, progress
            As for `fill_share`; None asks for all rows, and progress is on this part.

        Raises
        ------
        ThawlineError
            As `pipeline.extract.extract`; what was computed is carried over by the next call.
        """
        plan, computing = self.plan, self._computing
        if not self.lists(number):  # the part would lose the images that are not
            raise CacheError(f"part {number} of {plan.path} is not in this listing of its source; extract again")
        where = self._where[number]
        images = slice_source(self._images, where)
        mine = np.ones(len(images.items), bool) if asked is None else asked[where]
        if images.items and not mine.any():
            return FilledParts(plan.path)
        if not images.items:
            raise CacheError(f"no image is left for {plan.path_of(number).name}; the source changed: extract again")
        rows = rows_of(images)
        done = FilledParts(plan.path, rows=int(mine.sum()))

        def is_published() -> bool:
            file = open_part(plan, number)
            return file is not None and is_complete(file, rows, images.classes, mine)

        if not is_published():
            self.fetch(number)  # another machine may have been faster
        if is_published() and not computing.rehash:
            drop_tries(plan.path_of(number))
            return done
        layers = tuple(layer.name for layer in plan.layers)
        engine = self._network().engine(layers, (request_of(plan).pool,))
        began = time.perf_counter()
        replaced = etag_of(plan.path_of(number))
        carry = ~mine if computing.rehash else np.ones(len(mine), bool)
        donors = donors_of(plan, number) if carry.any() else ()
        try:
            with begin_try(plan, number, rows, images.classes, donors=donors, carry=carry) as writer:
                filler = CacheFiller(Opened(writer, engine, slice(len(layers))), mine, computing.on_error)
                fill(images, [filler], done.rows, computing.batch_size, computing.workers, done.clock, progress)
            published = publish_try(writer.cache.path, lambda: not computing.rehash and is_published(), replaced)
        except (CacheError, FileNotFoundError):
            if not is_published():
                raise
            drop_tries(plan.path_of(number))
            return done  # another process was faster, and deleted the file that this one was writing
        done.computed, done.few_levels, done.notes = filler.computed, filler.few_levels, filler.notes
        done.seconds = time.perf_counter() - began
        if not published:
            again = self.fill(number, asked, progress)
            again.add(replace(done, rows=0))
            return again
        return done

    def fetch(self, number: int) -> None:
        """Fetch from an object store what a part may take rows from, if the copy here has it not or older."""
        if (store := store_of(self.plan.path.parent)) is not None:
            store.fetch([donor.name for donor in donors_of(self.plan, number)])

    def _network(self) -> FeatureExtractor:
        """Return the network, after a check that it gives the features of the plan on this machine."""
        request = request_of(self.plan)
        wanted = [layer.fingerprint for layer in self.plan.layers]
        computing, found = self._computing, self.extractor
        engine = self.plan.pinned.get("engine", "auto") if computing.engine == "auto" else computing.engine
        follows = found is not None and engine in ("auto", found.engine_name(request.pool))
        if found is None or not follows or _fingerprints(found, request) != wanted:
            found = FeatureExtractor([request], engine, computing.device, computing.batch_size)
            if _fingerprints(found, request) != wanted:
                raise EngineError(
                    f"the weights or the version of thawline here give other features than {self.plan.path.name} is "
                    "for; use those that it was made with, or delete it and its parts"
                )
            self.extractor = found
        return found


_kept: tuple[tuple[str, str], PartFiller] | None = None
"""What a worker filled last in a run, with its listing and its network: the next part is mostly of the same plan."""


def fill_part(
    run: str, path: str, number: int, source: str, only: Sequence[str] | None, computing: Computing, progress: Progress
) -> FilledParts:
    """Fill one part on a worker.

    Parameters
    ----------
    run : str
        The same for all parts of one call, whose listings and network may be kept.
    path : str
        Path or URL of the plan.
    number : int
        Of the part.
    source : str
        What `open_source` takes.
    only : sequence of str, optional
        Uris of the part's images to compute, by default all.
    computing : Computing
    progress : callable
    """
    global _kept
    filler = _kept[1] if _kept is not None and _kept[0] == (run, path) else None
    if filler is None or not filler.lists(number):
        plan = open_plan(local_path(path, [Path(path).name])) if filler is None else filler.plan
        extractor = None if filler is None else filler.extractor
        _kept = filler = None  # the listing that it holds
        filler = PartFiller(plan, open_source(source, plan.range_of(number)), computing, extractor)
        _kept = (run, path), filler
    filler.fetch(number)  # the copy here may have an older part, which is complete
    return filler.fill(number, filler.rows_of(only), progress)


def _fingerprints(extractor: FeatureExtractor, request: Request) -> list[str]:
    try:
        return [extractor.spec(name, request).fingerprint for name in request.layers]
    except BackboneError:  # a layer that this network lacks
        return []


def request_of(plan: PartPlan) -> Request:
    """Return the request for exactly what a plan's parts hold: its layers by name, and its precision.

    Raises `DamagedCacheError` if the plan does not say what that is.
    """
    name = plan.request.get("backbone")
    try:
        size = parse_size(plan.request.get("size"))
        spec, *_ = [LayerSpec.from_json(layer.spec) for layer in plan.layers]
        if not isinstance(name, str) or max(spec.preprocessing.size) > LONGEST_SIDE:
            raise ValueError("its backbone or size makes no sense")
        if missing := {"backbone", "pool"} - plan.handles.keys():
            raise ValueError(f"its handles lack {', '.join(sorted(missing))}")
    except (ValueError, BackboneError) as error:
        raise DamagedCacheError(
            f"{plan.path} does not say how its layers are extracted: {error}; delete it and its parts, then extract "
            "again"
        ) from error
    asked = Request(name, tuple(layer.name for layer in plan.layers), spec.pool, spec.precision, spec.store, size)
    how = spec.preprocessing
    asked = replace(asked, white=how.white)
    return replace(asked, augment=how.augment, view=how.view) if isinstance(how, View) else asked


def _taking_first(part: Part) -> int:
    """Sort parts so that those which were cut from another take its rows before it loses them, the others as they are.

    In an object store a part is replaced, so that nothing else has those rows.
    """
    return 1 if part.origin is None else -part.origin  # an origin has a lower number than what is cut from it


def donors_of(plan: PartPlan, number: int) -> Iterator[Path]:
    """Yield the files whose rows a part may carry over: itself, tries at it, what it was before or was cut from."""
    origin = next((part.origin for part in plan.parts if part.number == number), None)
    for path in [plan.path_of(one) for one in (number, origin) if one is not None]:
        yield path
        yield from superseded_files(path).values()
        yield from (each for each in tries_of(path) if each.suffix not in (".lock", ".tmp"))


def follow_source(plan: PartPlan, images: ImageSource, digests: NDArray[np.uint8]) -> int:
    """Give the parts of a plan the rows of a changed source, with the features that they have; compute nothing.

    Parameters
    ----------
    plan : PartPlan
    images : ImageSource
    digests : (n, 16) uint8
        Of its images, zeros where one is not known.

    Returns
    -------
    int
        How many rows of parts that exist are pending now.
    """
    pending = 0
    for part, where in sorted(plan.ranges(images.items.rows.uris), key=lambda found: _taking_first(found[0])):
        own = slice_source(images, where)
        rows, published = rows_of(own), False
        while not published:
            replaced = etag_of(plan.path_of(part.number))
            file = open_part(plan, part.number)
            if file is None and part.origin is None:
                break
            if file is not None and same_rows(file, rows, own.classes) and not has_other_bytes(file, digests[where]):
                break
            donors = donors_of(plan, part.number)
            with begin_try(plan, part.number, rows, own.classes, donors=donors, digests=digests[where]) as writer:
                left = len(writer.pending())
            if published := publish_try(writer.cache.path, lambda: False, replaced):
                pending += left
    return pending
