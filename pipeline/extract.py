"""Stage 1: run frozen backbones over an image source once and keep their layers' features in a cache.

For each backbone: find what the cache already holds, and make room for the rest. Then one stream of the missing images,
read and decoded once, goes through all networks to their files. A request that a complete cache answers never imports
torch.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np

from features_cache import DONE, UNREADABLE, CacheError, drop_redundant, open_cache
from pipeline.extraction.filling import Clock, Filling
from pipeline.extraction.lookup import files_of, find_answer, rows_of, weights_file_digest
from pipeline.extraction.opening import Network, Run, Target, check_expected, open_files
from pipeline.images.loader import load
from pipeline.images.sources.registry import open_source
from pipeline.results import ExtractResult, Progress, silent
from pipeline.spec import (
    DEFAULT_BACKBONE,
    DEFAULT_CACHE,
    DEFAULT_LAYER,
    DEFAULT_POOL,
    NO_AUGMENT,
    LayerSpec,
    Request,
)


def extract(
    source: str | Path,
    backbones: Sequence[str] = (DEFAULT_BACKBONE,),
    layers: Sequence[str] = (DEFAULT_LAYER,),
    pool: str = DEFAULT_POOL,
    output: str | Path = DEFAULT_CACHE,
    *,
    precision: str = "auto",
    store: str = "float32",
    size: int | None = None,
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

    Parameters
    ----------
    source : str or Path
        A folder, an image, a ``.csv`` or ``.parquet`` manifest, a ``.tar`` shard, or ``"digits"``.
    backbones : sequence of str, default ("efficientnet_lite0",)
        ``NAME`` or ``NAME@WEIGHTS``.
    layers : sequence of str, default ("penultimate",)
        Dotted module names, ``penultimate``, ``stages``, ``logits`` or ``input``.
    pool : str, default "avg"
        One of `pipeline.spec.POOLS`.
    output : str or Path, default "thawline-cache"
        Folder of cache files; made if missing.
    precision : {"auto", "fp32", "bf16", "fp16"}
        ``auto`` keeps the precision of a file that is being continued, else takes bf16 where the hardware has it.
    store : {"float32", "float16"}
        Dtype on disk.
    size : int, optional
        Side of the square network input, pixels; the backbone's own by default.
    engine, device : str, default "auto"
        What computes; changes no value beyond rounding.
    batch_size, workers : int, optional
        Images in one forward pass, and decoding threads; chosen for the machine by default.
    on_error : {"skip", "stop"}
        Whether an image that cannot be decoded becomes an unreadable row or ends the run.
    rehash : bool, default False
        Read every file again instead of trusting size and modification time.
    augment : str, default "none"
        What views are made of, see `pipeline.images.augment`.
    views : sequence of int, optional
        Numbers of augmented views that are cached instead of the plain images, a file for each.
    only : collection of str, optional
        Uris of the images to compute; the others stay pending, and a later call may ask for them. By default all.
    expect : sequence of LayerSpec, optional
        Refuse to compute anything but these, precision aside.
    progress : callable, optional
        Called after every batch.

    Returns
    -------
    list of ExtractResult
        One for each cache file that holds what was asked.

    Raises
    ------
    ThawlineError
        The source, a backbone, a layer or the cache cannot be had; what was computed stays in the cache.
    """
    if Path(output).is_file():
        raise CacheError(f"{output} is a file; name the folder that is to hold the cache's files")
    images = open_source(source)
    rows = rows_of(images)
    asked = np.array([only is None or uri in only for uri in rows.uris], bool)
    target = Target(images, rows, asked)
    files = files_of(images, Path(output))
    found: dict[str, list[Path | Filling]] = {}
    clock = Clock()
    with ExitStack() as writers:
        run = Run(Path(output), engine, device, batch_size, on_error, rehash, clock, writers)
        networks: dict[tuple[str, str], tuple[str, Network]] = {}
        for name in dict.fromkeys(backbones):
            plain = Request(name, tuple(layers), pool, precision, store, size, weights_file_digest(name))
            requests = [replace(plain, augment=augment, view=view) for view in dict.fromkeys(views)] or [plain]
            found[name], missing = [], []
            for request in requests:
                answer = None if rehash else find_answer(files, request)
                if answer is None or not all(map(target.is_met, answer.values())):
                    missing.append(request)
                    continue
                specs = (LayerSpec.from_json(file.layers[layer].spec) for layer, file in answer.items())
                check_expected(specs, expect)
                found[name] += [file.path for file in dict.fromkeys(answer.values())]
            if missing:
                network = Network(missing, files, run)
                networks.setdefault(network.identity, (name, network))  # one network may be asked for by two names
        for name, network in networks.values():  # all are there before the first file is made
            found[name] += open_files(target, network, files, run, expect)
        items = list(dict.fromkeys(chain.from_iterable(found.values())))
        fillings = [item for item in items if isinstance(item, Filling)]
        seconds = _fill(target, fillings, batch_size, workers, clock, progress or silent) if fillings else 0.0
    for filling in fillings:
        drop_redundant(filling.writer.cache.path)
    return [_result(item, images.notes, seconds, clock) for item in items]


def _fill(
    target: Target,
    fillings: Sequence[Filling],
    batch_size: int | None,
    workers: int | None,
    clock: Clock,
    progress: Progress,
) -> float:
    """Stream the rows that any file lacks through one decode into all files; return the seconds it took."""
    began = time.perf_counter()
    shared = {filling.preprocessing.geometry: filling.preprocessing for filling in fillings}
    place = {geometry: number for number, geometry in enumerate(shared)}
    pending = np.flatnonzero(np.any([filling.pending for filling in fillings], axis=0))
    total = int(target.asked.sum())
    handled = total - len(pending)
    text = ", ".join(dict.fromkeys(filling.writer.cache.handles["backbone"] for filling in fillings))
    batch_size = batch_size or fillings[0].engine.resolved.batch_size

    def known(digest: bytes) -> bool:
        return all(filling.knows(digest) for filling in fillings)

    batches = load(target.images, pending, list(shared.values()), batch_size, workers, known)
    waited = time.perf_counter()
    for batch in batches:
        clock.spend("decode", waited)
        for filling in fillings:
            filling.feed(batch, batch.pixels[place[filling.preprocessing.geometry]])
        handled += len(batch.rows) + len(batch.duplicates) + len(batch.known) + len(batch.failures)
        progress(handled, total, text, f"bound by {clock.bound}")
        waited = time.perf_counter()
    for filling in fillings:
        filling.drain()
    return time.perf_counter() - began


def _result(item: Path | Filling, notes: list[str], seconds: float, clock: Clock) -> ExtractResult:
    filling = item if isinstance(item, Filling) else None
    file = open_cache(item.writer.cache.path if isinstance(item, Filling) else item)
    computed = filling.computed if filling else 0
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
        seconds=seconds if filling else 0.0,
        images_per_second=computed / seconds if computed else 0.0,
        bound=clock.bound if computed else None,
        notes=notes + (filling.engine.notes if filling else []),
    )
