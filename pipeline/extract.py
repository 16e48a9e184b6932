"""Stage 1: run frozen backbones over an image source once and keep their layers' features in a cache.

For each backbone, look up what the cache already holds, and open files for the rest. Then one stream of the missing
images, each read and decoded once, goes through all networks into their files. A request that a complete cache answers
never imports torch.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np

from features_cache import DONE, UNREADABLE, CacheError, CacheFile, drop_redundant
from pipeline.errors import SourceError
from pipeline.extraction.extractor import FeatureExtractor
from pipeline.extraction.fill import CacheFiller, Clock, fill
from pipeline.extraction.lookup import files_of, rows_of, weights_file_digest
from pipeline.extraction.open import Destination, bring_up_to_date, check_expected, open_files
from pipeline.images.sources.registry import ImageSource, open_source
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
    pool: str | Sequence[str] = DEFAULT_POOL,
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
    progress: Progress | None = None,
) -> list[ExtractResult]:
    """Cache the features of `layers` of every backbone for every image of `source`.

    If the source changed, the files of its other layers in the folder follow: they get its present images, labels,
    splits and groups, and keep the features that they have.

    Parameters
    ----------
    source : str, Path or ImageSource
        A folder, an image, a ``.csv`` or ``.parquet`` manifest, a ``.tar`` shard, or ``"digits"``; or what
        `pipeline.images.sources.registry.open_source` returned, so that several calls are of one listing.
    backbones : sequence of str, default ("efficientnet_lite0",)
        ``NAME`` or ``NAME@WEIGHTS``.
    layers : sequence of str, default ("penultimate",)
        Dotted module names, ``penultimate``, ``stages``, ``logits`` or ``input``.
    pool : str or sequence of str, default "avg"
        One of `pipeline.spec.POOLS`, or several: a cache file of each, from one pass of the network.
    output : str or Path, default "thawline-cache"
        Folder of cache files; created if missing.
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
        Read every file again instead of trusting size and modification time.
    augment : str, default "none"
        How views differ from the plain image, see `pipeline.images.augment`.
    views : sequence of int, optional
        Numbers of the augmented views to cache instead of the plain images, each in its own file.
    only : collection of str, optional
        Uris of the images to compute; the others stay pending, and a later call may ask for them. By default all.
    expect : sequence of LayerSpec, optional
        Features that a saved model needs: raise if others would be computed, precision aside.
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
    if Path(output).is_file():
        raise CacheError(f"{output} is a file; name the folder that is to hold the cache's files")
    if on_error not in ("skip", "stop"):
        raise SourceError(f"on_error is 'skip' or 'stop', got {on_error!r}")
    images = open_source(source)
    rows = rows_of(images)
    asked = np.array([only is None or uri in only for uri in rows.uris], bool)
    destination = Destination(images, rows, asked, Path(output), files_of(images, Path(output)), rehash)
    found: dict[str, list[CacheFile | CacheFiller]] = {}
    extractors: dict[tuple[str, str], tuple[str, FeatureExtractor]] = {}
    pools = dict.fromkeys([pool] if isinstance(pool, str) else pool)
    for name in dict.fromkeys(backbones):
        digest = weights_file_digest(name)
        plain = [Request(name, tuple(layers), one, precision, store, size, digest, white=white) for one in pools]
        seen = [replace(one, augment=augment, view=view) for one in plain for view in dict.fromkeys(views)]
        requests = seen or plain
        found[name], missing = [], []
        for request in requests:
            complete = destination.find_complete(request)
            if complete is None:
                missing.append(request)
                continue
            check_expected((LayerSpec.from_json(file.layers[layer].spec) for layer, file in complete.items()), expect)
            found[name] += dict.fromkeys(complete.values())
        if missing:
            extractor = FeatureExtractor(missing, engine, device, batch_size, destination.files)
            extractors.setdefault(extractor.identity, (name, extractor))  # one network may have been asked for twice
    clock = Clock()
    with ExitStack() as writers:
        for name, extractor in extractors.values():  # every network is loaded before the first file is created
            for opened in open_files(destination, extractor, expect):
                if isinstance(opened, CacheFile):
                    found[name].append(opened)
                    continue
                writers.enter_context(opened.writer)
                found[name].append(CacheFiller(opened, asked, on_error))
        parts = list(dict.fromkeys(chain.from_iterable(found.values())))
        fillers = [part for part in parts if isinstance(part, CacheFiller)]
        began = time.perf_counter()
        if fillers:
            fill(images, fillers, int(asked.sum()), batch_size, workers, clock, progress or silent)
        seconds = time.perf_counter() - began
    for filler in fillers:
        drop_redundant(filler.writer.cache.path)
    few_levels = _few_levels(max((filler.few_levels for filler in fillers), default=0))
    notes = [*images.notes, *few_levels, *bring_up_to_date(destination, list(map(_file_of, parts)))]
    return [_result(part, notes, seconds, clock) for part in parts]


def _few_levels(count: int) -> Iterator[str]:
    if count:
        yield (
            f"{count} grey images wider than 8 bits use less than a quarter of the range up to 65,535, so few grey "
            "levels are left of them: if they hold 10, 12 or 14 bits, set white to 1023, 4095 or 16383"
        )


def _file_of(part: CacheFile | CacheFiller) -> CacheFile:
    return part.writer.cache if isinstance(part, CacheFiller) else part


def _result(part: CacheFile | CacheFiller, notes: list[str], seconds: float, clock: Clock) -> ExtractResult:
    file, filler = _file_of(part), part if isinstance(part, CacheFiller) else None
    computed = filler.computed if filler else 0
    done = int((file.states == DONE).sum())
    return ExtractResult(
        path=str(file.path),
        backbone=file.handles["backbone"],
        layers={name: info.dim for name, info in file.layers.items()},
        rows=file.n_rows,
        done=done,
        unreadable=int((file.states == UNREADABLE).sum()),
        reused=done - computed,
        computed=computed,
        precision=next(iter(file.layers.values())).spec["precision"],
        engine=file.runs[-1]["engine"] if file.runs else "none",
        seconds=seconds if filler else 0.0,
        images_per_second=computed / seconds if computed else 0.0,
        bound=clock.bound if computed else None,
        notes=notes + (filler.notes if filler else []),
    )
