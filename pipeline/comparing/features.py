"""The features of an extraction: its layers and, once they are cached, the files that hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from features_cache import CacheFile, Catalog
from pipeline.comparing.jobs import Extraction, Finetune, Fit
from pipeline.comparing.plan import Plan
from pipeline.evaluation.labels import LabelsTable
from pipeline.extraction.lookup import files_of, find_answer, is_complete, rows_of, weights_file_digest
from pipeline.images.sources.registry import ImageSource
from pipeline.invalidation import stage_key
from pipeline.options import CLASSIFICATION, METRICS_OF, NEAR, head_name
from pipeline.spec import DECODE_POLICY, REDECODED, Request, aliases_of, fingerprint_of


@dataclass(frozen=True)
class Features:
    """The layers of one extraction.

    `aliases` has the layers that each name in the request stands for, `dims` the number of features of each layer,
    `files` the file that holds each (empty before the extraction); `complete` tells whether no image is pending in
    these.
    """

    aliases: Mapping[str, Sequence[str]]
    dims: Mapping[str, int]
    files: Mapping[str, CacheFile]
    complete: bool

    def catalog(self) -> Catalog:
        """Return a catalog of these files alone, in which every layer is unique."""
        files = list(dict.fromkeys(self.files.values()))
        return Catalog(files[0].path).only(files)


def find_features(extraction: Extraction, images: ImageSource, cache: Path) -> Features | None:
    """Return what a cache holds of an extraction, None if a layer is missing. Computes nothing."""
    files = files_of(images, cache)
    answer = find_answer(files, extraction.request)
    if answer is None:
        return None
    rows = rows_of(images)
    complete = all(is_complete(file, rows, images.classes) for file in answer.values())
    known = {alias: names for file in answer.values() for alias, names in aliases_of(file.request).items()}
    aliases = {alias: known[alias] for alias in extraction.request.layers}
    return Features(aliases, {name: file.layers[name].dim for name, file in answer.items()}, answer, complete)


@cache
def depths(request: Request, layers: tuple[str, ...]) -> dict[str, int]:
    """Return the index of each layer in the order of computation, from the image upwards."""
    from pipeline.backbones.aliases import LOGITS, PENULTIMATE
    from pipeline.backbones.layers import list_layers
    from pipeline.backbones.registry import sketch

    rows = list_layers(sketch(request.backbone, request.size))
    below = [row.name for row in rows if LOGITS not in row.aliases]
    order = [*below, PENULTIMATE, *(row.name for row in rows)]
    return {name: index for index, name in enumerate(sorted(layers, key=order.index))}


def question(plan: Plan, labels: LabelsTable | None) -> dict[str, str]:
    """Return what the keys of all jobs cover: labels, task and metric.

    What a plan leaves to its defaults is left out, so that older results are still found.
    """
    asked = {} if labels is None else {"labels": labels.digest}
    if plan.task != CLASSIFICATION:
        asked["task"] = plan.task
    if plan.metric != METRICS_OF[plan.task][0]:
        asked["metric"] = plan.metric
    return asked


def fit_key(fit: Fit, features: Features, source: str, asked: Mapping[str, str]) -> str:
    """Return the `stage_key` of a fit on the source of this name; `asked` is its `question`."""
    names = fit.layer.split("+")
    files = [features.files[name] for name in names]
    judges = {}
    if dict(fit.options).get("drop_leaks") == NEAR:  # the deepest layer of all tells what is near
        every = dict.fromkeys(features.files.values())
        judges = {"judges": sorted(info.fingerprint for file in every for info in file.layers.values())}
    return stage_key(
        "head",
        source=source,
        rows=[_rows_digest(file) for file in dict.fromkeys(files)],
        layers=[file.layers[name].fingerprint for name, file in zip(names, files, strict=True)],
        head=head_name(fit.head),
        options=fit.options,
        seed=fit.seed,
        shots=fit.shots,
        **judges,
        **asked,
    )


def listing_digest(images: ImageSource) -> str:
    """Return a digest of a source's classes and items; an image counts by its name, size and time of change.

    Decoding rules count only where they can differ, so that all other results outlive them.
    """
    redecoded = any(item.uri.lower().endswith(REDECODED) for item in images.items)
    return fingerprint_of([images.classes, [*images.items], *([DECODE_POLICY] if redecoded else [])])


def finetune_key(job: Finetune, source: str, listing: str, asked: Mapping[str, str]) -> str:
    """Return the `stage_key` of a fine-tune on the source of this name, whose `listing_digest` is `listing`.

    `asked` is its `question`.
    """
    options = dict(job.options)
    return stage_key(
        "finetune",
        source=source,
        rows=listing,
        options=job.options,
        weights=weights_file_digest(str(options["backbone"])),
        seed=job.seed,
        shots=job.shots,
        **asked,
    )


@cache  # hundreds of fits share a file
def _rows_digest(file: CacheFile) -> str:
    columns = [file.uris, file.labels, file.splits, file.groups, file.digests, file.states]
    return fingerprint_of([file.classes, *(column.tolist() for column in columns)])
