"""What a run needs besides its recipe: the network, the labelled rows, and where their inputs come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from features_cache import DONE, CacheFile, Catalog, open_cache
from pipeline.backbones.backbone import Backbone
from pipeline.backbones.cut import read_place
from pipeline.backbones.graph import INPUT, PENULTIMATE
from pipeline.backbones.pooling import pooled_dim
from pipeline.backbones.registry import load
from pipeline.engines.select import Resolved, resolve
from pipeline.errors import FitError
from pipeline.evaluation.splits import Splits, make_splits
from pipeline.extract import extract
from pipeline.finetuning.data import Activations, Ints, Pictures, Reader, Views
from pipeline.finetuning.network import ALL, line_of
from pipeline.heads.cached import Table, select
from pipeline.images.source import open_source
from pipeline.lookup import files_of, find_answer, is_complete, rows_of, weights_file_digest
from pipeline.results import ExtractResult, Progress
from pipeline.spec import DEFAULT_POOL, NO_AUGMENT, Request

FLAT = "flatten"


@dataclass(frozen=True)
class Wanted:
    """What to gather, and how to compute it.

    Parameters
    ----------
    source : str or Path
    backbone : str
        ``NAME`` or ``NAME@WEIGHTS``.
    freeze, top, augment : str
    views : int or None
        Augmented views to cache.
    draws : sequence of (int, int or str)
        Seeds and shots of the runs to come: views are extracted of the images that train in any of them.
    head_first : bool
    output : Path
        Folder of cache files, for what it holds already.
    folder : Path
        Of cache files that are made here.
    precision, store, engine, device : str
    size, workers : int, optional
        As for extraction.
    progress : callable
    say : callable
        Takes a sentence that the user should read now.
    extracted : list of list of ExtractResult
        Takes what each extraction came to.
    """

    source: str | Path
    backbone: str
    freeze: str
    top: str
    augment: str
    views: int | None
    draws: Sequence[tuple[int, int | str]]
    head_first: bool
    output: Path
    folder: Path
    precision: str
    store: str
    engine: str
    device: str
    size: int | None
    workers: int | None
    progress: Progress
    say: Callable[[str], None]
    extracted: list[list[ExtractResult]] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Material:
    """A loaded network and its rows.

    Parameters
    ----------
    backbone : Backbone
    resolved : Resolved
        Device and precision.
    table : Table
        Labelled rows that could be read.
    reader : Reader
        Of inputs for training.
    features : Reader or None
        Of what the classifier reads, where the head trains first.
    trunk_precision : str
        In which what is frozen computes, or was computed.
    """

    backbone: Backbone
    resolved: Resolved
    table: Table
    reader: Reader
    features: Reader | None
    trunk_precision: str


def gather(wanted: Wanted) -> Material:
    """Load the network, and extract what does not change while it trains.

    Raises
    ------
    ThawlineError
        Whatever loading and extraction raise, and, where views are asked for, splitting.
    """
    resolved = resolve(wanted.engine, wanted.device, wanted.precision)
    backbone = load(wanted.backbone, wanted.size)
    line, read = line_of(backbone, wanted.freeze), read_place(backbone)
    cached = line is not None and (wanted.augment == NO_AUGMENT or wanted.views is not None)
    pooled = read._replace(layout="vector")
    image = _extract(wanted, INPUT) if wanted.top == "direct" and (cached or wanted.head_first) else None
    features = _extract(wanted, PENULTIMATE) if wanted.head_first else None
    head_reader = None if features is None else Activations(features, PENULTIMATE, pooled, image)
    if line is None or not cached:
        base = features or image or _extract(wanted, INPUT)
        pictures = Pictures(open_source(wanted.source), backbone.preprocessing, wanted.augment, wanted.workers)
        return Material(backbone, resolved, _table([base]), pictures, head_reader, resolved.precision)
    if wanted.freeze == ALL:
        layer, pool, place, dim = PENULTIMATE, DEFAULT_POOL, pooled, pooled_dim(read.shape, read.layout, DEFAULT_POOL)
    else:
        layer, pool, place, dim = wanted.freeze, FLAT, line, int(np.prod(line.shape))
    if wanted.freeze != ALL or wanted.views is not None:
        _announce(wanted, _request(wanted, layer, pool), dim, resolved.precision)
    file = _extract(wanted, layer, pool)
    table = _table([one for one in (file, features, image) if one is not None])
    plain = Activations(file, layer, place, image)
    reader = plain if wanted.views is None else Views(plain, _views(wanted, table, plain))
    return Material(backbone, resolved, table, reader, head_reader, file.layers[layer].spec["precision"])


def splits_of(table: Table, seed: int, shots: int | str) -> Splits:
    """Return which rows of `table` train, choose and judge; raises `FitError` where they do not allow it."""
    columns = (table.labels, table.splits, table.groups, table.digests)
    return make_splits(*columns, seed, shots, table.classes, table.uris.tolist())


def _extract(wanted: Wanted, layer: str, pool: str = DEFAULT_POOL) -> CacheFile:
    """Return the file that holds `layer` of plain images."""
    (file,) = _extracted(wanted, layer, pool, _folder(wanted, layer, pool), wanted.precision)
    return file


def _views(wanted: Wanted, table: Table, plain: Activations) -> list[Activations]:
    """Return the augmented views of what `plain` has, extracted for all images that train with any seed and shots."""
    training = [splits_of(table, seed, shots).train for seed, shots in wanted.draws]
    index = np.unique(np.concatenate(training))
    rows, uris = table.rows[0][index], set(table.uris[index].tolist())

    def views(file: CacheFile, layer: str) -> list[CacheFile]:
        spec = file.layers[layer].spec
        augmented = {"augment": wanted.augment, "views": range(wanted.views or 0), "only": uris}
        found = _extracted(wanted, layer, spec["pool"], wanted.folder, spec["precision"], **augmented)
        for view in found:
            _require_rows(view, file, rows)
        return sorted(found, key=lambda view: view.layers[layer].spec["preprocessing"]["view"])

    files = views(plain.file, plain.layer)
    images = [None] * len(files) if plain.image is None else views(plain.image, INPUT)
    pairs = zip(files, images, strict=True)
    return [Activations(file, plain.layer, plain.place, image) for file, image in pairs]


def _extracted(
    wanted: Wanted, layer: str, pool: str, folder: Path, precision: str, **augmented: Any
) -> list[CacheFile]:
    results = extract(
        wanted.source,
        [wanted.backbone],
        [layer],
        pool,
        folder,
        precision=precision,
        store=wanted.store,
        size=wanted.size,
        engine=wanted.engine,
        device=wanted.device,
        workers=wanted.workers,
        progress=wanted.progress,
        **augmented,
    )
    wanted.extracted.append(results)
    for note in dict.fromkeys(note for result in results for note in result.notes):
        wanted.say(note)
    return [open_cache(result.path) for result in results]


def _folder(wanted: Wanted, layer: str, pool: str) -> Path:
    """Return the user's cache folder if it holds `layer` already, else the folder for what training alone needs."""
    images = open_source(wanted.source)
    answer, rows = find_answer(files_of(images, wanted.output), _request(wanted, layer, pool)), rows_of(images)
    held = answer is not None and all(is_complete(file, rows, images.classes) for file in answer.values())
    return wanted.output if held else wanted.folder


def _request(wanted: Wanted, layer: str, pool: str) -> Request:
    digest = weights_file_digest(wanted.backbone)
    return Request(wanted.backbone, (layer,), pool, wanted.precision, wanted.store, wanted.size, digest)


def _announce(wanted: Wanted, plain: Request, dim: int, precision: str) -> None:
    """Say what disk space those activations will take that have no file yet; views are asked for in `precision`."""
    images = open_source(wanted.source)
    files = [*files_of(images, wanted.output), *files_of(images, wanted.folder)]
    numbers = range(wanted.views or 0)
    views = [replace(plain, precision=precision, augment=wanted.augment, view=number) for number in numbers]
    missing = sum(find_answer(files, request) is None for request in (plain, *views))
    if missing:
        rows, text = len(images.items), f", plain and in {len(views)} augmented views," if views else ""
        size = rows * dim * np.dtype(wanted.store).itemsize * missing
        wanted.say(
            f"activations at {plain.layers[0]} of {rows} images{text} take {size / 1e6:,.0f} MB in {wanted.folder}"
        )


def _table(files: Sequence[CacheFile]) -> Table:
    """Return the labelled rows of the first file, which must be there in the others too."""
    table = select(Catalog(files[0].path), [next(iter(files[0].layers))])[0].table
    for file in files[1:]:
        _require_rows(file, files[0], table.rows[0])
    return table


def _require_rows(file: CacheFile, first: CacheFile, rows: Ints) -> None:
    """Raise `FitError` unless `file` has the rows of `first`, and features of `rows` (k,)."""
    if not (np.array_equal(file.uris, first.uris) and (file.states[rows] == DONE).all()):
        raise FitError(f"{file.path.name} lacks rows of {first.path.name}: the source changed; run it again")
