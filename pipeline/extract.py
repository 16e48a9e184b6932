"""Stage 1: run frozen backbones over an image source once and keep their layers' features in a cache.

For each backbone, look up what the cache already holds, and open files for the rest. Then one stream of the missing
images, each read and decoded once, goes through all networks into their files. A request that a complete cache answers
never imports torch.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from features_cache import DONE, PLAN_SUFFIX, UNREADABLE, CacheError, CacheFile, PartPlan, drop_redundant, open_plan
from pipeline.errors import EngineError, SourceError
from pipeline.extraction.extractor import FeatureExtractor
from pipeline.extraction.fill import CacheFiller, Clock, fill
from pipeline.extraction.lookup import files_of, rows_of, weights_file_digest
from pipeline.extraction.object_store import local_path
from pipeline.extraction.open import Destination, bring_up_to_date, check_expected, open_files
from pipeline.extraction.parts import Computing, FilledParts, PartFiller, fill_part, parse_share
from pipeline.images.augment import parse_augment
from pipeline.images.sources.registry import ImageSource, open_source
from pipeline.images.sources.remote import is_url, locate
from pipeline.results import ExtractResult, Progress, silent
from pipeline.spec import (
    DEFAULT_BACKBONE,
    DEFAULT_CACHE,
    DEFAULT_LAYER,
    DEFAULT_POOL,
    NO_AUGMENT,
    LayerSpec,
    Request,
    Size,
)


def extract(
    source: str | Path | ImageSource,
    backbones: Sequence[str] = (DEFAULT_BACKBONE,),
    layers: Sequence[str] = (DEFAULT_LAYER,),
    pool: str | Sequence[str] = (DEFAULT_POOL,),
    output: str | Path = DEFAULT_CACHE,
    *,
    precision: str = "auto",
    store: str = "float32",
    size: Size | None = None,
    white: int | None = None,
    engine: str = "auto",
    device: str = "auto",
    batch_size: int | None = None,
    workers: int | None = None,
    on_error: str = "skip",
    rehash: bool = False,
    augment: str = NO_AUGMENT,
    views: Sequence[int] = (),
    only: Collection[str] | None = None,
    expect: Sequence[LayerSpec] | None = None,
    part: str | None = None,
    part_rows: int | None = None,
    cluster: str | None = None,
    progress: Progress | None = None,
) -> list[ExtractResult]:
    """Cache the features of `layers` of every backbone for every image of `source`.

    If the source changed, the files of its other layers in the folder follow: they get its present images, labels,
    splits and groups, and keep the features that they have.

    Parameters
    ----------
    source : str, Path or ImageSource
        What `pipeline.images.sources.registry.open_source` takes: a folder, a manifest, an archive, a URL, …; or what
        it returned, so that several calls are of one listing.
    backbones : sequence of str, default ("efficientnet_lite0",)
        ``NAME`` or ``NAME@WEIGHTS``.
    layers : sequence of str, default ("penultimate",)
        Dotted module names, ``penultimate``, ``stages``, ``logits`` or ``input``.
    pool : str or sequence of str, default ("avg",)
        One of `pipeline.spec.POOLS`, or several: a cache file of each, from one pass of the network.
    output : str or Path, default "thawline-cache"
        Folder of cache files; created if missing. Or a folder in an object store, such as ``s3://bucket/photos``: the
        cache is in parts there, and results name its copy on this machine.
    precision : {"auto", "fp32", "bf16", "fp16"}
        ``auto`` keeps the precision of a file that is continued; for a new file it is bf16 if the hardware computes it,
        else fp32.
    store : {"float32", "float16"}
        Dtype on disk.
    size : int or tuple of int, optional
        Side, or height and width, of the network's input, in pixels; the backbone's own by default.
    white : int, optional
        The level that is white in grey images wider than 8 bits, such as 4095 where 16-bit files hold 12 bits. By
        default 65,535, or what the tags of a TIFF say.
    engine, device : str, default "auto"
        What computes the features; they differ by rounding only.
    batch_size, workers : int, optional
        Images in one forward pass, and images decoded at once; chosen for the machine by default.
    on_error : {"skip", "stop"}
        Whether an image that cannot be decoded becomes an unreadable row or ends the run.
    rehash : bool, default False
        Read every file that is asked for again instead of trusting size and modification time.
    augment : str, default "none"
        How views differ from the plain image, see `pipeline.images.augment`; an error without `views`.
    views : sequence of int, optional
        Numbers of the augmented views to cache instead of the plain images, each in its own file.
    only : collection of str, optional
        Uris of the images to compute; the others stay pending, and a later call may ask for them. By default all.
    expect : sequence of LayerSpec, optional
        Features that a saved model needs: raise if others would be computed, precision aside.
    part : str, optional
        ``"3/64"`` extracts the third of 64 shares of the parts of a large source; any number of processes may extract
        one cache so, at the same time. Without it, all parts that exist already are extracted.
    part_rows : int, optional
        Make new caches of more rows than this in parts of at most so many rows. By default, a source is extracted in
        parts only if `part` or `cluster` is given, of at most 262,144 rows and 512 MB.
    cluster : str, optional
        Extract all parts on the workers of a Dask cluster, see `pipeline.extraction.cluster.parse_cluster`. Source and
        `output` must be at the same paths on all of them.
    progress : callable, optional
        Called after every batch.

    Returns
    -------
    list of ExtractResult
        One for each cache file that holds what was asked.

    Raises
    ------
    ThawlineError
        The source, a backbone, a layer or the cache is not available; what was computed stays in the cache.

    Examples
    --------
    >>> from tempfile import mkdtemp
    >>> from features_cache import open_cache
    >>> (result,) = extract("digits", layers=["blocks.1"], pool="grid2", size=32, output=mkdtemp())
    >>> result.layers, result.done, result.unreadable
    ({'blocks.1': 96}, 1797, 0)
    >>> X, y = open_cache(result.path).xy("blocks.1")
    >>> X.shape
    (1797, 96)
    """
    folder = local_path(output, None if cluster is None else ())
    if folder.is_file() or (is_url(str(output)) and folder.suffix in (".h5", PLAN_SUFFIX)):
        raise CacheError(f"{output} is a file; name the folder that is to hold the cache's files")
    if on_error not in ("skip", "stop"):
        raise SourceError(f"on_error is 'skip' or 'stop', got {on_error!r}")
    if parse_augment(augment) and not views:
        raise SourceError(
            f"augment '{augment}' is for views, and none were asked for; give their numbers, such as [0, 1]"
        )
    share = parse_share(part)
    computing = Computing(engine, device, batch_size, workers, on_error, rehash)
    plain = [
        Request("", tuple(layers), one, precision, store, size, white=white)
        for one in dict.fromkeys([pool] if isinstance(pool, str) else pool)
    ]
    seen = [replace(one, augment=augment, view=view) for one in plain for view in dict.fromkeys(views)]
    if part is not None and part_rows is None:
        part_rows = 0
    wanted = _Wanted(tuple(backbones), seen or plain, output, only, expect, part_rows)
    if cluster is not None:
        if part is not None:
            raise SourceError("a cluster extracts all parts of a source; leave out part")
        place = str(output).rstrip("/") if is_url(str(output)) else folder.absolute()
        wanted = replace(wanted, output=place, part_rows=part_rows or 0)
        results = _extract_on(cluster, source, wanted, computing, progress or silent)
        folder = local_path(place)
        return [replace(one, path=str(folder / Path(one.path).name)) for one in results]
    return _extract_here(source, folder, wanted, computing, rehash, share, progress or silent)


@dataclass(frozen=True)
class _Wanted:
    """What to extract and where to, as for `extract`; of `requests`, each backbone gets its own."""

    backbones: Sequence[str]
    requests: Sequence[Request]
    output: str | Path
    only: Collection[str] | None
    expect: Sequence[LayerSpec] | None
    part_rows: int | None


def _extract_here(
    source: str | Path | ImageSource,
    folder: Path,
    wanted: _Wanted,
    computing: Computing,
    rehash: bool,
    share: tuple[int, int],
    progress: Progress,
) -> list[ExtractResult]:
    """Extract in this process; `rehash` is for the files that are not in parts, that of `computing` for parts."""
    only, expect = wanted.only, wanted.expect
    images = open_source(source)
    rows = rows_of(images)
    asked = np.ones(len(rows), bool) if only is None else np.array([uri in only for uri in rows.uris], bool)
    files = files_of(images, folder)
    destination = Destination(images, rows, asked, folder, files, rehash, wanted.part_rows, whole=share[0] == 0)
    found: dict[str, list[CacheFile | CacheFiller | PartFiller]] = {}
    extractors: dict[tuple[Any, ...], tuple[str, FeatureExtractor]] = {}
    for name in dict.fromkeys(wanted.backbones):
        digest = weights_file_digest(name)
        requests = [replace(one, backbone=name, weights_file=digest) for one in wanted.requests]
        complete, missing = _look_up(requests, destination, expect)
        found[name] = [*complete]
        if missing:
            extractor = FeatureExtractor(
                missing, computing.engine, computing.device, computing.batch_size, destination.files
            )
            extractors.setdefault(extractor.identity, (name, extractor))  # one network may have been asked for twice
    clock = Clock()
    with ExitStack() as writers:
        for name, extractor in extractors.values():  # every network is loaded before the first file is created
            found[name] += _open(extractor, destination, computing, expect, writers)
        fillers = [one for one in chain.from_iterable(found.values()) if isinstance(one, CacheFiller)]
        began = time.perf_counter()
        if fillers:
            fill(images, fillers, int(asked.sum()), computing.batch_size, computing.workers, clock, progress)
        seconds = time.perf_counter() - began
    for filler in fillers:
        drop_redundant(filler.writer.cache.path)
    made: list[CacheFile | CacheFiller | FilledParts] = [
        one.fill_share(asked, share, progress) if isinstance(one, PartFiller) else one
        for one in dict.fromkeys(chain.from_iterable(found.values()))
    ]
    few_levels = _few_levels(max((one.few_levels for one in made if not isinstance(one, CacheFile)), default=0))
    notes = [*images.notes, *few_levels, *_bring_up_to_date(destination, made)]
    if is_url(str(wanted.output)):
        notes.append(f"the cache is at {locate(str(wanted.output))}; results name its copy on this machine")
    return [_result(one, notes, seconds, clock) for one in made]


def _look_up(
    requests: Sequence[Request], destination: Destination, expect: Sequence[LayerSpec] | None
) -> tuple[dict[CacheFile, None], list[Request]]:
    """Return the files of requests that the cache answers without a network, and the other requests."""
    found: dict[CacheFile, None] = {}
    missing = []
    for request in requests:
        complete = destination.find_complete(request)
        if complete is None:
            missing.append(request)
            continue
        check_expected((LayerSpec.from_json(file.layers[layer].spec) for layer, file in complete.items()), expect)
        found |= dict.fromkeys(complete.values())
    return found, missing


def _open(
    extractor: FeatureExtractor,
    destination: Destination,
    computing: Computing,
    expect: Sequence[LayerSpec] | None,
    writers: ExitStack,
) -> Iterator[CacheFile | CacheFiller | PartFiller]:
    """Yield what holds the features of an extractor, ready to be filled; `writers` closes the files."""
    for opened in open_files(destination, extractor, expect):
        if isinstance(opened, CacheFile):
            yield opened
        elif isinstance(opened, PartPlan):
            yield PartFiller(opened, destination.images, computing, extractor)
        else:
            writers.enter_context(opened.writer)
            yield CacheFiller(opened, destination.asked, computing.on_error)


def _extract_on(
    cluster: str, source: str | Path | ImageSource, wanted: _Wanted, computing: Computing, progress: Progress
) -> list[ExtractResult]:
    """Extract on a cluster: one task plans, one fills each part, and the last does what is not in parts."""
    from pipeline.extraction.cluster import open_cluster, place_of

    where, output = place_of(source), wanted.output
    uris = None if wanted.only is None else sorted(set(wanted.only))
    with open_cluster(cluster) as workers:
        progress(0, 0, "plan")
        names = workers.call(_plan_parts, where, wanted, computing)
        plans = [open_plan(local_path(output, names) / name) for name in names]
        began, run = time.perf_counter(), uuid.uuid4().hex
        tasks, total = {}, 0
        for plan in plans:
            for part, chosen in plan.ranges(uris or ()):
                asked = None if uris is None else uris[chosen]
                total += part.rows if asked is None else len(asked)
                if asked is None or asked:
                    place = f"{output}/{plan.path.name}"
                    tasks[plan.path_of(part.number).name] = (run, place, part.number, where, asked, computing)
        filled = {plan.path.name: FilledParts(plan.path) for plan in plans}
        text = ", ".join(dict.fromkeys(plan.handles["backbone"] for plan in plans))

        def keep(_: str, done: FilledParts) -> None:
            filled[done.path.name].add(done)

        def tell(running: Mapping[str, int], state: str) -> None:
            rows = sum(done.rows for done in filled.values()) + sum(running.values())
            progress(min(rows, total), total, text, state)

        origins = {plan.path_of(part.origin).name for plan in plans for part in plan.parts if part.origin is not None}
        if not is_url(str(output)):  # a folder keeps what a part was
            origins.clear()
        for last in (False, True):  # what was cut from a part takes its rows before it loses them
            some = {name: task for name, task in tasks.items() if (name in origins) == last}
            if failed := workers.call_each(fill_part, some, keep, tell):
                why = "; ".join(f"{name}: {error}" for name, error in failed.items())
                raise EngineError(f"{len(failed)} of {len(tasks)} parts failed; the same command does the rest: {why}")
        seconds = time.perf_counter() - began
        results: list[ExtractResult] = workers.call(_extract_rest, where, wanted, computing)
    return [_with_parts(result, filled.get(Path(result.path).name), seconds) for result in results]


def _plan_parts(source: str, wanted: _Wanted, computing: Computing, progress: Progress) -> list[str]:
    """Make the plans of what is wanted, on a worker, and return the names of those in parts; compute no features."""
    none, folder = replace(wanted, only=()), local_path(wanted.output)
    results = _extract_here(source, folder, none, computing, False, (0, 1), progress)
    return [path.name for result in results if (path := Path(result.path)).suffix == PLAN_SUFFIX]


def _extract_rest(source: str, wanted: _Wanted, computing: Computing, progress: Progress) -> list[ExtractResult]:
    """Extract what is not in parts, on a worker, and look up what is: its rows have been read already."""
    in_parts, folder = replace(computing, rehash=False), local_path(wanted.output)
    return _extract_here(source, folder, wanted, in_parts, computing.rehash, (0, 1), progress)


def _with_parts(result: ExtractResult, filled: FilledParts | None, seconds: float) -> ExtractResult:
    """Add to the result of a cache in parts what was computed on the cluster, in so many seconds."""
    if filled is None:
        return result
    computed = filled.computed + result.computed
    return replace(
        result,
        computed=computed,
        reused=result.done - computed,
        seconds=seconds,
        images_per_second=computed / seconds,
        bound=filled.clock.bound if computed else None,
        notes=list(dict.fromkeys([*result.notes, *filled.notes, *_few_levels(filled.few_levels)])),
    )


def _few_levels(count: int) -> Iterator[str]:
    if count:
        yield (
            f"{count} grey images wider than 8 bits use less than a quarter of the range up to 65,535, so few grey "
            "levels are left of them: if they hold 10, 12 or 14 bits, set white to 1023, 4095 or 16383"
        )


def _bring_up_to_date(destination: Destination, made: Sequence[CacheFile | CacheFiller | FilledParts]) -> list[str]:
    """Bring the other files of the source up to date, unless parts of what was extracted are missing or behind."""
    files = list(map(_file_of, made))
    return bring_up_to_date(destination, files) if all(map(destination.has_rows_of, files)) else []


def _file_of(made: CacheFile | CacheFiller | FilledParts) -> CacheFile:
    if isinstance(made, CacheFiller):
        return made.writer.cache
    return made.file if isinstance(made, FilledParts) else made


def _result(
    made: CacheFile | CacheFiller | FilledParts, notes: list[str], seconds: float, clock: Clock
) -> ExtractResult:
    file = _file_of(made)
    computed, own_notes = (0, []) if isinstance(made, CacheFile) else (made.computed, made.notes)
    if isinstance(made, FilledParts):
        seconds, clock = made.seconds, made.clock
    done, runs = int((file.states == DONE).sum()), file.runs
    return ExtractResult(
        path=str(file.path),
        backbone=file.handles["backbone"],
        layers={name: info.dim for name, info in file.layers.items()},
        rows=file.n_rows + file.missing_rows,
        done=done,
        unreadable=int((file.states == UNREADABLE).sum()),
        reused=done - computed,
        computed=computed,
        precision=next(iter(file.layers.values())).spec["precision"],
        engine=runs[-1]["engine"] if runs else "none",
        seconds=0.0 if isinstance(made, CacheFile) else seconds,
        images_per_second=computed / seconds if computed else 0.0,
        bound=clock.bound if computed else None,
        notes=[*notes, *own_notes, *([file.missing_note] if file.missing_note else [])],
    )
