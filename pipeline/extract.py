"""Stage 1: run frozen backbones over an image source once and keep their layers' features in a cache.

For each backbone: find what the cache already holds, and make room for the rest. Then one stream of the missing images,
read and decoded once, goes through all networks to their files. A request that a complete cache answers never imports
torch.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from features_cache import (
    DONE,
    UNREADABLE,
    CacheFile,
    CacheWriter,
    LayerInfo,
    Rows,
    drop_redundant,
    file_name,
    grow,
    open_cache,
    same_rows,
)
from pipeline.errors import ModelFileError
from pipeline.filling import Clock, Filling
from pipeline.images.loader import load
from pipeline.images.source import ImageSource, open_source
from pipeline.lookup import (
    continued_precision,
    files_of,
    find_answer,
    find_holder,
    is_complete,
    rows_of,
    weights_file_digest,
)
from pipeline.results import ExtractResult, Progress
from pipeline.spec import (
    DEFAULT_BACKBONE,
    DEFAULT_CACHE,
    DEFAULT_LAYER,
    DEFAULT_POOL,
    LayerSpec,
    Request,
    fingerprint_of,
)

if TYPE_CHECKING:
    from pipeline.backbones.backbone import Backbone
    from pipeline.backbones.graph import TappedNetwork
    from pipeline.engines.select import Resolved


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
    run = _Run(Path(output), engine, device, batch_size, workers, on_error, rehash, progress or _silent)
    images = open_source(source)
    rows = rows_of(images)
    found: list[Path | Filling] = []
    clock = Clock()
    with ExitStack() as writers:
        for name in dict.fromkeys(backbones):
            request = Request(name, tuple(layers), pool, precision, store, size, weights_file_digest(name))
            files = files_of(images, run.output)
            answer = None if rehash else find_answer(files, request)
            if answer is not None and all(is_complete(file, rows, images.classes) for file in answer.values()):
                specs = (LayerSpec.from_json(file.layers[layer].spec) for layer, file in answer.items())
                _check_expected(specs, expect)
                found += [file.path for file in dict.fromkeys(answer.values())]
            else:
                found += _open(images, rows, request, files, run, expect, clock, writers)
        fillings = [item for item in found if isinstance(item, Filling)]
        seconds = _fill(images, fillings, run, clock) if fillings else 0.0
    for filling in fillings:
        drop_redundant(filling.writer.cache.path)
    return [_result(item, seconds, clock) for item in dict.fromkeys(found)]


@dataclass(frozen=True)
class _Run:
    """How to run, as opposed to what to compute."""

    output: Path
    engine: str
    device: str
    batch_size: int | None
    workers: int | None
    on_error: str
    rehash: bool
    progress: Progress


def _silent(done: int, total: int, text: str, state: str = "") -> None:
    """Report nothing."""


def _open(
    images: ImageSource,
    rows: Rows,
    request: Request,
    files: list[CacheFile],
    run: _Run,
    expect: Sequence[LayerSpec] | None,
    clock: Clock,
    writers: ExitStack,
) -> list[Path | Filling]:
    """Return the files that hold parts of `request`, open for writing where they lack rows, and a new one for the rest.

    `writers` closes what is opened here.
    """
    from pipeline.backbones.graph import resolve_layers, tap
    from pipeline.backbones.registry import load as load_backbone
    from pipeline.engines.engine import build_engine
    from pipeline.engines.select import resolve

    resolved = resolve(run.engine, run.device, continued_precision(files, request) or request.precision)
    backbone = load_backbone(request.backbone, request.size)
    aliases = {asked: list(resolve_layers(backbone, [asked])) for asked in request.layers}
    names = list(dict.fromkeys(name for group in aliases.values() for name in group))
    specs = {name: _spec(backbone, name, request, resolved) for name in names}
    _check_expected(specs.values(), expect)
    batch_size = run.batch_size or resolved.batch_size

    def fill(writer: CacheWriter, network: TappedNetwork) -> Filling:
        writers.enter_context(writer)
        engine = build_engine(network, resolved, batch_size)
        writer.begin_run(_provenance(engine.resolved))
        return Filling(writer, engine, backbone.preprocessing, run.on_error, clock)

    found: list[Path | Filling] = []
    holders = {name: find_holder(files, spec) for name, spec in specs.items()}
    for file in dict.fromkeys(holder for holder in holders.values() if holder):
        if is_complete(file, rows, images.classes) and not run.rehash:
            found.append(file.path)
            continue
        network = tap(backbone, list(file.layers), request.pool)
        if same_rows(file, rows, images.classes) and not run.rehash:
            writer = CacheWriter.resume(file.path)
        else:
            old = list(file.layers.values()), file.handles, file.request
            writer = grow(file.path, rows, images.classes, *old, carry=not run.rehash)
        found.append(fill(writer, network))
    missing = [name for name in names if holders[name] is None]
    if missing:
        network = tap(backbone, missing, request.pool)
        layers = [_layer_info(specs[name], network.dims[name]) for name in missing]
        key = fingerprint_of([images.location, *(layer.fingerprint for layer in layers)])
        path = run.output / file_name(images.name, backbone.handle, key)
        handles = {"source": images.name, "location": images.location, "backbone": backbone.handle}
        handles["pool"] = request.pool
        if path.exists():
            open_cache(path)  # a damaged file under this name is refused with its own reason
        asked = request.to_json() | {"aliases": aliases}
        found.append(fill(CacheWriter.create(path, rows, images.classes, layers, handles, asked), network))
    return found


def _fill(images: ImageSource, fillings: Sequence[Filling], run: _Run, clock: Clock) -> float:
    """Stream the rows that any file lacks through one decode into all files; return the seconds it took."""
    began = time.perf_counter()
    shared = {filling.preprocessing.geometry: filling.preprocessing for filling in fillings}
    place = {geometry: number for number, geometry in enumerate(shared)}
    pending = np.flatnonzero(np.any([filling.pending for filling in fillings], axis=0))
    handled, total = len(images.items) - len(pending), len(images.items)
    text = ", ".join(dict.fromkeys(filling.writer.cache.handles["backbone"] for filling in fillings))
    batch_size = run.batch_size or fillings[0].engine.resolved.batch_size

    def known(digest: bytes) -> bool:
        return all(filling.knows(digest) for filling in fillings)

    batches = load(images, pending, list(shared.values()), batch_size, run.workers, known)
    waited = time.perf_counter()
    for batch in batches:
        clock.spend("decode", waited)
        for filling in fillings:
            filling.feed(batch, batch.pixels[place[filling.preprocessing.geometry]])
        handled += len(batch.rows) + len(batch.duplicates) + len(batch.known) + len(batch.failures)
        run.progress(handled, total, text, f"bound by {clock.bound}")
        waited = time.perf_counter()
    for filling in fillings:
        filling.drain()
    return time.perf_counter() - began


def _spec(backbone: Backbone, layer: str, request: Request, resolved: Resolved) -> LayerSpec:
    return LayerSpec(
        backbone.name,
        backbone.weights_digest,
        layer,
        request.pool,
        backbone.preprocessing,
        resolved.precision,
        request.store,
    )


def _layer_info(spec: LayerSpec, dim: int) -> LayerInfo:
    return LayerInfo(spec.layer, dim, spec.store, spec.to_json(), spec.fingerprint)


def _check_expected(specs: Iterable[LayerSpec], expect: Sequence[LayerSpec] | None) -> None:
    """Refuse features that are not the expected ones; another precision is no other feature."""
    for found, wanted in zip(specs, expect or (), strict=False):
        if replace(found, precision=wanted.precision) != wanted:
            old, new = wanted.to_json(), found.to_json()
            changed = ", ".join(key for key in old if old[key] != new[key] and key != "precision")
            raise ModelFileError(
                f"the model was trained on other features of {wanted.backbone} {wanted.layer}: {changed} differ here; "
                "use the weights and versions it was trained with, or train it again"
            )


def _provenance(resolved: Resolved) -> dict[str, Any]:
    names = ("thawline", "torch", "torchvision", "timm", "numpy", "pillow", "openvino")
    return {
        "engine": resolved.engine,
        "device": resolved.device,
        "precision": resolved.precision,
        "command": " ".join(sys.argv),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
    }


def _result(item: Path | Filling, seconds: float, clock: Clock) -> ExtractResult:
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
        notes=filling.engine.notes if filling else [],
    )
