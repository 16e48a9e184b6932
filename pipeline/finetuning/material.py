"""What a run needs besides its recipe: the network, the labelled rows, and where their inputs come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from features_cache import DONE, CacheFile, Catalog, open_cache
from pipeline.arrays import IntArray
from pipeline.backbones.backbone import Backbone
from pipeline.backbones.layers import INPUT, PENULTIMATE
from pipeline.backbones.pooling import pooled_dim
from pipeline.backbones.registry import load
from pipeline.backbones.thaw_line import top_input
from pipeline.engines.select import Resolved, resolve
from pipeline.errors import FitError
from pipeline.evaluation.rows import Table, select
from pipeline.evaluation.splits import Splits, make_splits
from pipeline.extract import extract
from pipeline.extraction.lookup import files_of, find_answer, is_complete, rows_of, weights_file_digest
from pipeline.finetuning.inputs import Activations, Pictures, Reader, Views
from pipeline.finetuning.network import ALL, line_of
from pipeline.finetuning.plan import Plan
from pipeline.images.sources.registry import open_source
from pipeline.spec import DEFAULT_POOL, NO_AUGMENT, Request

FLAT = "flatten"


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


def gather(plan: Plan, draws: Sequence[tuple[int, int | str]]) -> Material:
    """Load the network, and extract what does not change while it trains.

    Parameters
    ----------
    plan : Plan
    draws : sequence of (int, int or str)
        Seeds and shots of the runs to come: views are extracted of the images that train in any of them.

    Raises
    ------
    ThawlineError
        Whatever loading and extraction raise, and, where views are asked for, splitting.
    """
    resolved = resolve(plan.engine, plan.device, plan.precision)
    backbone = load(plan.backbone, plan.size)
    line, read = line_of(backbone, plan.freeze), top_input(backbone)
    cached = line is not None and (plan.recipe.augment == NO_AUGMENT or plan.recipe.views is not None)
    pooled = read._replace(layout="vector")
    image = _extract(plan, INPUT) if plan.recipe.top == "direct" and (cached or plan.head_first) else None
    features = _extract(plan, PENULTIMATE) if plan.head_first else None
    head_reader = None if features is None else Activations(features, PENULTIMATE, pooled, image)
    if line is None or not cached:
        base = features or image or _extract(plan, INPUT)
        pictures = Pictures(open_source(plan.source), backbone.preprocessing, plan.recipe.augment, plan.workers)
        return Material(backbone, resolved, _table([base]), pictures, head_reader, resolved.precision)
    if plan.freeze == ALL:
        layer, pool, place, dim = PENULTIMATE, DEFAULT_POOL, pooled, pooled_dim(read.shape, read.layout, DEFAULT_POOL)
    else:
        layer, pool, place, dim = plan.freeze, FLAT, line, int(np.prod(line.shape))
    if plan.freeze != ALL or plan.recipe.views is not None:
        _announce(plan, _request(plan, layer, pool), dim, resolved.precision)
    file = _extract(plan, layer, pool)
    table = _table([one for one in (file, features, image) if one is not None])
    plain = Activations(file, layer, place, image)
    reader = plain if plan.recipe.views is None else Views(plain, _views(plan, draws, table, plain))
    return Material(backbone, resolved, table, reader, head_reader, file.layers[layer].spec["precision"])


def splits_of(table: Table, seed: int, shots: int | str) -> Splits:
    """Return which rows of `table` train, choose and judge; raises `FitError` where they do not allow it."""
    columns = (table.labels, table.splits, table.groups, table.digests)
    return make_splits(*columns, seed, shots, table.classes, table.uris.tolist())


def _extract(plan: Plan, layer: str, pool: str = DEFAULT_POOL) -> CacheFile:
    """Return the file that holds `layer` of plain images."""
    (file,) = _extracted(plan, layer, pool, _folder(plan, layer, pool), plan.precision)
    return file


def _views(plan: Plan, draws: Sequence[tuple[int, int | str]], table: Table, plain: Activations) -> list[Activations]:
    """Return the augmented views of what `plain` has, extracted for all images that train with any seed and shots."""
    training = [splits_of(table, seed, shots).train for seed, shots in draws]
    index = np.unique(np.concatenate(training))
    rows, uris = table.rows[0][index], set(table.uris[index].tolist())

    def views(file: CacheFile, layer: str) -> list[CacheFile]:
        spec = file.layers[layer].spec
        augmented = {"augment": plan.recipe.augment, "views": range(plan.recipe.views or 0), "only": uris}
        found = _extracted(plan, layer, spec["pool"], plan.folder, spec["precision"], **augmented)
        for view in found:
            _require_rows(view, file, rows)
        return sorted(found, key=lambda view: view.layers[layer].spec["preprocessing"]["view"])

    files = views(plain.file, plain.layer)
    images = [None] * len(files) if plain.image is None else views(plain.image, INPUT)
    pairs = zip(files, images, strict=True)
    return [Activations(file, plain.layer, plain.place, image) for file, image in pairs]


def _extracted(plan: Plan, layer: str, pool: str, folder: Path, precision: str, **augmented: Any) -> list[CacheFile]:
    results = extract(
        plan.source,
        [plan.backbone],
        [layer],
        pool,
        folder,
        precision=precision,
        store=plan.store,
        size=plan.size,
        engine=plan.engine,
        device=plan.device,
        workers=plan.workers,
        progress=plan.progress,
        **augmented,
    )
    plan.extracted.append(results)
    for note in dict.fromkeys(note for result in results for note in result.notes):
        plan.say(note)
    return [open_cache(result.path) for result in results]


def _folder(plan: Plan, layer: str, pool: str) -> Path:
    """Return the user's cache folder if it holds `layer` already, else the folder for what training alone needs."""
    images = open_source(plan.source)
    answer, rows = find_answer(files_of(images, plan.output), _request(plan, layer, pool)), rows_of(images)
    held = answer is not None and all(is_complete(file, rows, images.classes) for file in answer.values())
    return plan.output if held else plan.folder


def _request(plan: Plan, layer: str, pool: str) -> Request:
    digest = weights_file_digest(plan.backbone)
    return Request(plan.backbone, (layer,), pool, plan.precision, plan.store, plan.size, digest)


def _announce(plan: Plan, plain: Request, dim: int, precision: str) -> None:
    """Say what disk space those activations will take that have no file yet; views are asked for in `precision`."""
    images = open_source(plan.source)
    files = [*files_of(images, plan.output), *files_of(images, plan.folder)]
    numbers = range(plan.recipe.views or 0)
    views = [replace(plain, precision=precision, augment=plan.recipe.augment, view=number) for number in numbers]
    missing = sum(find_answer(files, request) is None for request in (plain, *views))
    if missing:
        rows, text = len(images.items), f", plain and in {len(views)} augmented views," if views else ""
        size = rows * dim * np.dtype(plan.store).itemsize * missing
        plan.say(f"activations at {plain.layers[0]} of {rows} images{text} take {size / 1e6:,.0f} MB in {plan.folder}")


def _table(files: Sequence[CacheFile]) -> Table:
    """Return the labelled rows of the first file, which must be there in the others too."""
    table = select(Catalog(files[0].path), [next(iter(files[0].layers))])[0].table
    for file in files[1:]:
        _require_rows(file, files[0], table.rows[0])
    return table


def _require_rows(file: CacheFile, first: CacheFile, rows: IntArray) -> None:
    """Raise `FitError` unless `file` has the rows of `first`, and features of `rows` (k,)."""
    if not (np.array_equal(file.uris, first.uris) and (file.states[rows] == DONE).all()):
        raise FitError(f"{file.path.name} lacks rows of {first.path.name}: the source changed; run it again")
