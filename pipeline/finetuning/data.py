"""What the runs of a call have in common: the options, the backbone, the labelled rows, and where inputs come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from features_cache import DONE, CacheFile, Catalog, open_cache
from pipeline.arrays import IntArray
from pipeline.backbones.aliases import INPUT, PENULTIMATE
from pipeline.backbones.backbone import Backbone
from pipeline.backbones.pooling import Layout, pooled_dim
from pipeline.backbones.registry import load_backbone
from pipeline.backbones.thaw_line import top_input
from pipeline.engines.select import Resolved, resolve
from pipeline.errors import FitError
from pipeline.evaluation.labels import LabelsTable
from pipeline.evaluation.rows import Table, select
from pipeline.evaluation.splits import Splits, make_splits
from pipeline.extract import extract
from pipeline.extraction.lookup import files_of, find_answer, is_complete, rows_of, weights_file_digest
from pipeline.finetuning.inputs import CachedActivations, DecodedImages, Files, InputReader
from pipeline.finetuning.network import ALL, line_of
from pipeline.finetuning.recipe import Recipe
from pipeline.images.sources.registry import ImageSource
from pipeline.options import CLASSIFICATION
from pipeline.results import ExtractResult, Progress
from pipeline.spec import DEFAULT_POOL, NO_AUGMENT, NO_POOL, Request, Size

FOLDER = "finetune"
"""Folder inside the cache folder, for checkpoints and for cache files that only training reads. Other readers of the
cache folder do not look into it."""


@dataclass(frozen=True)
class TrainingSetup:
    """The arguments of `pipeline.finetune.finetune` that are the same for all seeds and shots.

    `source` is listed once, so that all that is read in a call is of the same images. `extracted` collects the results
    of each call of `pipeline.extract.extract`.
    """

    source: ImageSource
    backbone: str
    freeze: str
    recipe: Recipe
    init: str
    head_first: bool
    watch: bool
    output: Path
    precision: str
    store: str
    size: Size | None
    white: int | None
    engine: str
    device: str
    workers: int | None
    cluster: str | None
    progress: Progress
    say: Callable[[str], None]
    labels: LabelsTable | None = None
    task: str = CLASSIFICATION
    extracted: list[list[ExtractResult]] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """For checkpoints, and for cache files that only training reads."""
        return self.output / FOLDER

    @property
    def rate(self) -> float:
        """Learning rate of the new top and of the layers next to it."""
        return self.recipe.rate(new_only=self.freeze == "all" or self.init == "random")


@dataclass(frozen=True, eq=False)
class TrainingData:
    """A loaded backbone, and the labelled rows that it is trained and tested on.

    `reader` gives the network's inputs, and `features` those of the new top if it is trained first. `trunk_precision`
    is the precision in which the trunk computes, or computed the cached activations.
    """

    backbone: Backbone
    resolved: Resolved
    table: Table
    reader: InputReader
    features: InputReader | None
    trunk_precision: str


def prepare_data(setup: TrainingSetup, draws: Sequence[tuple[int, int | str]]) -> TrainingData:
    """Load the backbone, and extract what stays the same during training.

    `draws` are the seeds and shots of the runs to come; views are extracted of the images that train in any of them.
    """
    recipe = setup.recipe
    resolved = resolve(setup.engine, setup.device, setup.precision)
    backbone = load_backbone(setup.backbone, setup.size, setup.white)
    line, read = line_of(backbone, setup.freeze), top_input(backbone)
    pooled = read._replace(layout=Layout("vector"))
    cached = line is not None and (recipe.augment == NO_AUGMENT or recipe.views is not None)
    image = extract_plain(setup, INPUT) if recipe.top == "direct" and (cached or setup.head_first) else None
    features = extract_plain(setup, PENULTIMATE) if setup.head_first else None
    top_reader = None if features is None else CachedActivations(PENULTIMATE, pooled, (features, image))
    if line is None or not cached:
        listing = features or image or extract_plain(setup, INPUT)
        images = DecodedImages(setup.source, backbone.preprocessing, recipe.augment, setup.workers, listing.digests)
        return TrainingData(backbone, resolved, _table([listing], setup), images, top_reader, resolved.precision)
    layer, pool = (PENULTIMATE, DEFAULT_POOL) if setup.freeze == ALL else (setup.freeze, _keeping(line.layout))
    if setup.freeze != ALL or recipe.views is not None:
        dim = pooled_dim(line.shape, line.layout, pool)
        _announce_size(setup, _request(setup, layer, pool), dim, resolved.precision)
    file = extract_plain(setup, layer, pool)
    table = _table([one for one in (file, features, image) if one is not None], setup)
    views = () if recipe.views is None else _extract_views(setup, draws, table, layer, (file, image))
    reader = CachedActivations(layer, pooled if setup.freeze == ALL else line, (file, image), views)
    return TrainingData(backbone, resolved, table, reader, top_reader, file.layers[layer].spec["precision"])


def _keeping(layout: Layout) -> str:
    """Return the pool that keeps all activations; maps had ``flatten`` before there was ``none``, which is the same."""
    return NO_POOL if layout.kind == "tokens" else "flatten"


def splits_of(table: Table, seed: int, shots: int | str) -> Splits:
    """Split `table` into train, val and test as `fit` does; raises `FitError` if it cannot be split."""
    columns = (table.labels, table.splits, table.groups, table.digests)
    return make_splits(*columns, seed, shots, table.classes, table.uris.tolist(), values=table.values)


def extract_plain(setup: TrainingSetup, layer: str, pool: str = DEFAULT_POOL) -> CacheFile:
    """Return the file that holds `layer` of the plain images."""
    (file,) = _extract(setup, layer, pool, _folder(setup, layer, pool), setup.precision)
    return file


def _extract_views(
    setup: TrainingSetup, draws: Sequence[tuple[int, int | str]], table: Table, layer: str, plain: Files
) -> list[Files]:
    """Return the augmented views of `plain`, extracted for all images that train in any of the `draws`."""
    training = [splits_of(table, seed, shots).train for seed, shots in draws]
    index = np.unique(np.concatenate(training))
    rows, uris = table.rows[0][index], set(table.uris[index].tolist())

    def views(file: CacheFile, layer: str) -> list[CacheFile]:
        spec = file.layers[layer].spec
        augmented = {"augment": setup.recipe.augment, "views": range(setup.recipe.views or 0), "only": uris}
        found = _extract(setup, layer, spec["pool"], setup.folder, spec["precision"], **augmented)
        for view in found:
            _require_rows(view, file, rows)
        return sorted(found, key=lambda view: view.layers[layer].spec["preprocessing"]["view"])

    file, image = plain
    files = views(file, layer)
    return list(zip(files, [None] * len(files) if image is None else views(image, INPUT), strict=True))


def _extract(
    setup: TrainingSetup, layer: str, pool: str, folder: Path, precision: str, **augmented: Any
) -> list[CacheFile]:
    results = extract(
        setup.source,
        [setup.backbone],
        [layer],
        pool,
        folder,
        precision=precision,
        store=setup.store,
        size=setup.size,
        white=setup.white,
        engine=setup.engine,
        device=setup.device,
        workers=setup.workers,
        cluster=setup.cluster,
        progress=setup.progress,
        **augmented,
    )
    setup.extracted.append(results)
    for note in dict.fromkeys(note for result in results for note in result.notes):
        setup.say(note)
    files = [open_cache(result.path) for result in results]
    for file in files:
        if file.uris.tolist() != [item.uri for item in setup.source.items]:  # another process made it follow the source
            raise _source_changed(file)
    return files


def _folder(setup: TrainingSetup, layer: str, pool: str) -> Path:
    """Return the user's cache folder if it holds `layer` of all images already, else the folder of training."""
    images = setup.source
    answer, rows = find_answer(files_of(images, setup.output), _request(setup, layer, pool)), rows_of(images)
    held = answer is not None and all(is_complete(file, rows, images.classes) for file in answer.values())
    return setup.output if held else setup.folder


def _request(setup: TrainingSetup, layer: str, pool: str) -> Request:
    digest = weights_file_digest(setup.backbone)
    settings = setup.precision, setup.store, setup.size, digest
    return Request(setup.backbone, (layer,), pool, *settings, white=setup.white)


def _announce_size(setup: TrainingSetup, plain: Request, dim: int, precision: str) -> None:
    """Say how much disk space the activations will take that have no file yet; views are asked for in `precision`."""
    images = setup.source
    files = [*files_of(images, setup.output), *files_of(images, setup.folder)]
    numbers = range(setup.recipe.views or 0)
    views = [replace(plain, precision=precision, augment=setup.recipe.augment, view=number) for number in numbers]
    missing = sum(find_answer(files, request) is None for request in (plain, *views))
    if missing:
        rows, text = len(images.items), f", plain and in {len(views)} augmented views," if views else ""
        size = rows * dim * np.dtype(setup.store).itemsize * missing
        setup.say(
            f"activations at {plain.layers[0]} of {rows} images{text} take {size / 1e6:,.0f} MB in {setup.folder}"
        )


def _table(files: Sequence[CacheFile], setup: TrainingSetup) -> Table:
    """Return the labelled rows of the first file; raises `FitError` if another file lacks any of them."""
    table = select(Catalog(files[0].path), [next(iter(files[0].layers))], labels=setup.labels, task=setup.task)[0].table
    for file in files[1:]:
        _require_rows(file, files[0], table.rows[0])
    return table


def _require_rows(file: CacheFile, first: CacheFile, rows: IntArray) -> None:
    """Raise `FitError` unless `file` has features of the same images in `rows` (k,) as `first`."""
    if not ((file.states[rows] == DONE).all() and np.array_equal(file.digests[rows], first.digests[rows])):
        raise _source_changed(file)


def _source_changed(file: CacheFile) -> FitError:
    return FitError(f"the source changed while {file.path.name} was extracted; run the same command again")
