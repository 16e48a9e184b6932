"""Stage 1: run frozen backbones over an image source once and keep their layers' features in a cache.

For each backbone: find what the cache already holds, make room for the rest, and stream the missing images through
decode, network and writer. A request that a complete cache answers never imports torch.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Iterable, Sequence
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
    Donors,
    LayerInfo,
    Rows,
    drop_redundant,
    file_name,
    grow,
    open_cache,
    same_rows,
)
from pipeline.errors import ModelFileError, SourceError
from pipeline.images.loader import Batch, Duplicate, Known, load
from pipeline.images.source import ImageSource, open_source
from pipeline.lookup import continued_precision, files_of, find_answer, find_holder, is_complete, rows_of, weights_file_digest
from pipeline.results import ExtractResult
from pipeline.spec import (
    DEFAULT_BACKBONE,
    DEFAULT_CACHE,
    DEFAULT_LAYER,
    DEFAULT_POOL,
    LayerSpec,
    Preprocessing,
    Request,
    fingerprint_of,
)

if TYPE_CHECKING:
    from pipeline.backbones.registry import Backbone
    from pipeline.engines.select import Resolved
    from pipeline.engines.torch_engine import TorchEngine

Progress = Callable[[int, int, str], None]
"""``progress(images done, images in all, backbone)``, called after every batch."""


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
        See `Progress`.

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
    results: list[ExtractResult] = []
    for name in backbones:
        request = Request(name, tuple(layers), pool, precision, store, size, weights_file_digest(name))
        files = files_of(images, run.output)
        answer = None if rehash else find_answer(files, request)
        if answer is not None and all(is_complete(file, rows, images.classes) for file in answer.values()):
            _check_expected((LayerSpec.from_json(file.layers[layer].spec) for layer, file in answer.items()), expect)
            results += [_result(file.path, computed=0, seconds=0.0) for file in dict.fromkeys(answer.values())]
        else:
            results += _compute(images, rows, request, files, run, expect)
    return results


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


def _silent(done: int, total: int, text: str) -> None:
    """Report nothing."""


def _compute(
    images: ImageSource,
    rows: Rows,
    request: Request,
    files: list[CacheFile],
    run: _Run,
    expect: Sequence[LayerSpec] | None,
) -> list[ExtractResult]:
    """Bring the files that hold parts of `request` up to date, and make a new one for what none holds."""
    from pipeline.backbones.graph import resolve_layers, tap
    from pipeline.backbones.registry import load as load_backbone
    from pipeline.engines.select import resolve
    from pipeline.engines.torch_engine import TorchEngine

    resolved = resolve(run.engine, run.device, continued_precision(files, request) or request.precision)
    backbone = load_backbone(request.backbone, request.size)
    aliases = {asked: list(resolve_layers(backbone, [asked])) for asked in request.layers}
    names = list(dict.fromkeys(name for group in aliases.values() for name in group))
    specs = {name: _spec(backbone, name, request, resolved) for name in names}
    _check_expected(specs.values(), expect)

    holders = {name: find_holder(files, spec) for name, spec in specs.items()}
    missing = [name for name in names if holders[name] is None]
    results = []
    for file in dict.fromkeys(holder for holder in holders.values() if holder):
        if is_complete(file, rows, images.classes) and not run.rehash:
            results.append(_result(file.path, computed=0, seconds=0.0))
            continue
        engine = TorchEngine(tap(backbone, list(file.layers), request.pool), resolved)
        if same_rows(file, rows, images.classes) and not run.rehash:
            writer = CacheWriter.resume(file.path)
        else:
            old = list(file.layers.values()), file.handles, file.request
            writer = grow(file.path, rows, images.classes, *old, carry=not run.rehash)
        results.append(_fill(writer, images, backbone.preprocessing, engine, resolved, run))
    if missing:
        network = tap(backbone, missing, request.pool)
        layers = [_layer_info(specs[name], network.dims[name]) for name in missing]
        key = fingerprint_of([images.location, *(layer.fingerprint for layer in layers)])
        path = run.output / file_name(images.name, backbone.handle, key)
        handles = {"source": images.name, "backbone": backbone.handle, "pool": request.pool}
        asked = request.to_json() | {"location": images.location, "aliases": aliases}
        if path.exists():
            open_cache(path)  # a damaged file under this name is refused with its own reason
        writer = CacheWriter.create(path, rows, images.classes, layers, handles, asked)
        results.append(_fill(writer, images, backbone.preprocessing, TorchEngine(network, resolved), resolved, run))
    return results


def _fill(
    writer: CacheWriter,
    images: ImageSource,
    preprocessing: Preprocessing,
    engine: TorchEngine,
    resolved: Resolved,
    run: _Run,
) -> ExtractResult:
    """Stream the pending rows of one file through decode, network and writer."""
    names = list(writer.cache.layers)
    computed, started = 0, time.perf_counter()
    with writer:
        writer.begin_run(_provenance(resolved))
        donors = Donors(run.output, {info.fingerprint for info in writer.cache.layers.values()})
        pending = writer.pending()
        handled, total = len(images.items) - len(pending), len(images.items)
        batch_size = run.batch_size or resolved.batch_size
        batches = load(images, pending, preprocessing, batch_size, run.workers, lambda digest: digest in donors)
        for batch, features in engine.stream(batches):
            writer.write(
                batch.rows, dict(zip(names, features, strict=True)), batch.digests, batch.sizes, batch.mtimes_ns
            )
            _write_copies(writer, batch, donors)
            for failure in batch.failures:
                if run.on_error == "stop":
                    raise SourceError(
                        f"{images.items[failure.row].uri}: {failure.reason}; mend or remove it, or use --on-error skip"
                    )
                digest = None if failure.digest is None else np.frombuffer(failure.digest, np.uint8)
                writer.fail(failure.row, failure.reason, digest, failure.size, failure.mtime_ns)
            computed += len(batch.rows)
            handled += len(batch.rows) + len(batch.duplicates) + len(batch.known) + len(batch.failures)
            run.progress(handled, total, writer.cache.handles["backbone"])
    drop_redundant(writer.cache.path)
    return _result(writer.cache.path, computed, time.perf_counter() - started)


def _write_copies(writer: CacheWriter, batch: Batch, donors: Donors) -> None:
    """Write the rows of a batch whose features exist already: seen before in this run, or in any file of the folder."""
    copies: list[Duplicate | Known] = [*batch.duplicates, *batch.known]
    if not copies:
        return
    twins = [copy.of for copy in batch.duplicates]
    given = [donors[copy.digest] for copy in batch.known]
    features = {
        name: np.concatenate([writer.read(name, twins), *(donor[name][None] for donor in given)])
        for name in writer.cache.layers
    }
    digests = np.frombuffer(b"".join(copy.digest for copy in copies), np.uint8).reshape(len(copies), -1)
    sizes, mtimes = [copy.size for copy in copies], [copy.mtime_ns for copy in copies]
    writer.write([copy.row for copy in copies], features, digests, sizes, mtimes)


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
    names = ("thawline", "torch", "torchvision", "timm", "numpy", "pillow")
    return {
        "engine": resolved.engine,
        "device": resolved.device,
        "precision": resolved.precision,
        "command": " ".join(sys.argv),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
    }


def _result(path: Path, computed: int, seconds: float) -> ExtractResult:
    file = open_cache(path)
    done = int((file.states == DONE).sum())
    return ExtractResult(
        path=str(path),
        backbone=file.handles["backbone"],
        layers={name: info.dim for name, info in file.layers.items()},
        rows=file.n_rows,
        done=done,
        unreadable=int((file.states == UNREADABLE).sum()),
        reused=done - computed,
        computed=computed,
        precision=next(iter(file.layers.values())).spec["precision"],
        engine=file.runs[-1]["engine"] if file.runs else "none",
        seconds=seconds,
        images_per_second=computed / seconds if seconds else 0.0,
    )
