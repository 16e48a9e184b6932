"""What an extraction stands for: its layers by name and, once they are cached, the files that hold them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from features_cache import CacheFile, Catalog, open_cache
from pipeline.comparing.jobs import Extraction, Finetune, Fit
from pipeline.extraction.lookup import files_of, find_answer, is_complete, rows_of, weights_file_digest
from pipeline.images.sources.registry import ImageSource
from pipeline.provenance import installed_version
from pipeline.spec import TRAINING_RULES, Request, fingerprint_of


@dataclass(frozen=True)
class Features:
    """The layers of one extraction.

    Parameters
    ----------
    aliases : dict of str to sequence of str
        What each layer that was asked for stands for.
    dims : dict of str to int
        Features of each layer.
    files : dict of str to CacheFile
        Which file holds which layer; empty before anything is extracted.
    complete : bool
        Whether every image is in these files, done or unreadable.
    """

    aliases: Mapping[str, Sequence[str]]
    dims: Mapping[str, int]
    files: Mapping[str, CacheFile]
    complete: bool

    def catalog(self) -> Catalog:
        """Return these files alone as a catalog, in which every layer is unique."""
        files = list(dict.fromkeys(self.files.values()))
        catalog = Catalog(files[0].path)
        catalog.files = files
        return catalog


def find_features(extraction: Extraction, images: ImageSource, cache: Path) -> Features | None:
    """Look up in a cache what was extracted before; None where some layer is not there. Computes nothing."""
    files = files_of(images, cache)
    answer = find_answer(files, extraction.request)
    if answer is None:
        return None
    rows = rows_of(images)
    complete = all(is_complete(file, rows, images.classes) for file in answer.values())
    known = {alias: names for file in answer.values() for alias, names in file.request["aliases"].items()}
    aliases = {alias: known[alias] for alias in extraction.request.layers}
    return Features(aliases, {name: file.layers[name].dim for name, file in answer.items()}, answer, complete)


def held_features(known: Features, paths: Iterable[str]) -> Features:
    """Return `known` with its layers in the files that an extraction returned, whatever request they were made for."""
    holders = {name: file for file in map(open_cache, paths) for name in file.layers}
    return replace(known, files={name: holders[name] for name in known.dims}, complete=True)


@cache
def depths(request: Request, layers: tuple[str, ...]) -> dict[str, int]:
    """Return the place of each layer in the order of computation, from the image upwards."""
    from pipeline.backbones.registry import sketch
    from pipeline.backbones.taps import LOGITS, PENULTIMATE, describe

    rows = describe(sketch(request.backbone, request.size))
    below = [row.name for row in rows if LOGITS not in row.aliases]
    order = [*below, PENULTIMATE, *(row.name for row in rows)]
    return {name: place for place, name in enumerate(sorted(layers, key=order.index))}


def fit_key(fit: Fit, features: Features, source: str) -> str:
    """Return a digest of all that a fit's result depends on, and of the name of its source."""
    parts = [features.files[name] for name in fit.layer.split("+")]
    names = zip(fit.layer.split("+"), parts, strict=True)
    return fingerprint_of(
        {
            "kind": "head",
            "source": source,
            "rules": _rules(),
            "rows": [_rows_digest(file) for file in dict.fromkeys(parts)],
            "layers": [file.layers[name].fingerprint for name, file in names],
            "head": fit.head.removesuffix("/standard"),
            "options": fit.options,
            "seed": fit.seed,
            "shots": fit.shots,
        }
    )


def listing_digest(images: ImageSource) -> str:
    """Return a digest of what a source lists, by which images count with their size and time."""
    return fingerprint_of([images.classes, images.items])


def finetune_key(job: Finetune, source: str, listing: str) -> str:
    """Return a digest of all that a fine-tune's result depends on, its source's `listing_digest` among it."""
    return fingerprint_of(
        {
            "kind": "finetune",
            "source": source,
            "rules": [*_rules(), installed_version("torch")],
            "rows": listing,
            "options": job.options,
            "weights": weights_file_digest(str(dict(job.options)["backbone"])),
            "seed": job.seed,
            "shots": job.shots,
        }
    )


@cache
def _rules() -> list[Any]:
    return [TRAINING_RULES, installed_version("thawline"), installed_version("scikit-learn")]


@cache  # one file stands for hundreds of fits
def _rows_digest(file: CacheFile) -> str:
    columns = [file.uris, file.labels, file.splits, file.groups, file.digests, file.states]
    return fingerprint_of([file.classes, *(column.tolist() for column in columns)])
