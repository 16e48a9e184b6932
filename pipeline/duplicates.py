"""Find near-duplicates: copies of an image that were resized, recompressed, cropped, mirrored or toned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from features_cache import CacheFile, Catalog
from pipeline.arrays import Float32Array, IntArray
from pipeline.errors import FitError
from pipeline.extraction.object_store import open_catalog
from pipeline.neighbours.groups import group_images
from pipeline.neighbours.nearest import near_pairs
from pipeline.neighbours.planting import threshold_of
from pipeline.neighbours.rows import (
    BLOCK,
    DistinctImages,
    find_layer,
    label_of,
    missing_notes,
    require_same_features,
)
from pipeline.neighbours.table import write_rows
from pipeline.results import FoundCopy, GroupedImage, NearThreshold, Neighbour, Progress


@dataclass(frozen=True)
class DuplicatesReport:
    """Groups of near-duplicates in one cache, or what of a second cache is in the first.

    Parameters
    ----------
    near : NearThreshold
        From which similarity on images count as near-duplicates, and how far that can be trusted.
    images : list of int
        How many different images each cache holds.
    groups : list of list of GroupedImage
        The largest first; in each, all images are near the first one. Empty if there is a second cache.
    copies : list of FoundCopy
        The images of the second cache that are near-duplicates of images of the first, the nearest first.
    notes : list of str
    files : tuple of CacheFile
        The caches.
    """

    near: NearThreshold
    images: list[int]
    groups: list[list[GroupedImage]]
    copies: list[FoundCopy]
    notes: list[str]
    files: tuple[CacheFile, ...]


def duplicates(
    cache: str | Path | Catalog,
    second: str | Path | Catalog | None = None,
    layer: str | None = None,
    source: str | None = None,
    backbone: str | None = None,
    pool: str | None = None,
    threshold: float | None = None,
    *,
    engine: str = "auto",
    device: str = "auto",
    progress: Progress | None = None,
) -> DuplicatesReport:
    """Find groups of near-duplicates in a cache, or images of a second cache that are in the first.

    Parameters
    ----------
    cache, second : str, Path or Catalog
        Folders of cache files, or files. They need no labels. `source` selects a file of the first only.
    layer : str, optional
        By default ``penultimate``, or the only layer.
    source, backbone, pool : str, optional
        Select a file if a cache holds several.
    threshold : float, optional
        Least similarity of near-duplicates. By default it is measured with planted copies of images of the (first)
        cache, which takes its images and its network; it is kept beside the cache.
    engine, device : str, default "auto"
        As for extraction, of the planted copies.
    progress : callable, optional
        As for extraction.

    Raises
    ------
    CacheError
        If a cache or the layer cannot be found.
    FitError
        If features are not comparable or not finite, there are too few images, or nearly all look alike.
    SourceError
        If the images are not where they were.

    Examples
    --------
    ::

        report = duplicates("cache")
        for group in report.groups:
            print([image.uri for image in group])
    """
    catalogs = [open_catalog(one) for one in (cache, second) if one is not None]
    file, layer = find_layer(catalogs[0], layer, source, backbone, pool)
    files = (file, *(find_layer(other, layer, None, backbone, pool)[0] for other in catalogs[1:]))
    if len(files) > 1:
        require_same_features(files[0], files[1], layer)
    sets = [DistinctImages(each, layer) for each in files]
    near = threshold_of(sets[0], threshold, engine=engine, device=device, progress=progress)
    counts = [len(images) for images in sets]
    notes = [*_notes(near), *missing_notes(*files)]
    if len(sets) > 1:
        return DuplicatesReport(near, counts, [], _found_copies(sets[0], sets[1], near.threshold), notes, files)
    if len(sets[0].done) < 2:
        raise FitError(f"{file.path} holds a single image; nothing can be compared")
    return DuplicatesReport(near, counts, _groups(sets[0], near.threshold), [], notes, files)


def _notes(near: NearThreshold) -> list[str]:
    if not near.copies:
        return ["the threshold was given, so it is not known what it finds and what it takes for a copy by mistake"]
    if near.false_alarms is None:
        return ["without groups or classes, false alarms cannot be measured: look at some of the groups"]
    return []


def _groups(images: DistinctImages, threshold: float) -> list[list[GroupedImage]]:
    """Return the groups of at least two rows, copies of equal bytes among them."""
    centres = group_images(near_pairs(images, threshold), len(images))
    similarity = _to_centre(images, centres)
    centre_of = centres[images.copies]
    order = np.lexsort((-similarity[images.copies], images.copies != centre_of, centre_of))
    starts = np.flatnonzero(np.diff(centre_of[order], prepend=-1))
    found = [
        [_grouped(images.file, int(images.done[at]), float(similarity[images.copies[at]])) for at in members]
        for members in np.split(order, starts[1:])
        if len(members) > 1
    ]
    return sorted(found, key=len, reverse=True)


def _to_centre(images: DistinctImages, centres: IntArray) -> Float32Array:
    """Return the similarity of each image to the centre of its group, 1 for the centre itself."""
    similarity = np.ones(len(images), np.float32)
    members = np.flatnonzero(centres != np.arange(len(images)))
    for start in range(0, len(members), BLOCK):
        part = members[start : start + BLOCK]
        found = np.einsum("nd,nd->n", images.take(part), images.take(centres[part]))
        similarity[part] = np.minimum(found, 1)
    return similarity


def _grouped(file: CacheFile, row: int, similarity: float) -> GroupedImage:
    return GroupedImage(str(file.uris[row]), similarity, label_of(file, row), str(file.splits[row]))


def _found_copies(first: DistinctImages, second: DistinctImages, threshold: float) -> list[FoundCopy]:
    """Return the rows of the second cache that are near an image of the first, with the nearest of these."""
    pairs = near_pairs(first, threshold, second)
    order = np.lexsort((pairs.first, -pairs.similarity, pairs.second))
    kept = order[np.flatnonzero(np.diff(pairs.second[order], prepend=-1))]
    best = dict(zip(pairs.second[kept].tolist(), kept.tolist(), strict=True))
    found = [
        FoundCopy(
            str(second.file.uris[row]),
            label_of(second.file, row),
            Neighbour(
                str(first.uris[pairs.first[best[image]]]),
                float(pairs.similarity[best[image]]),
                first.label(int(pairs.first[best[image]])),
            ),
        )
        for row, image in zip(second.done.tolist(), second.copies.tolist(), strict=True)
        if image in best
    ]
    return sorted(found, key=lambda copy: -copy.original.similarity)


def write_duplicates(report: DuplicatesReport, path: Path) -> None:
    """Write the groups as ``group,uri,similarity,label,split``, or copies as ``uri,original,similarity,label``.

    Raises `CacheError` if the file cannot be written.
    """
    if len(report.files) > 1:
        rows = [(one.uri, one.original.uri, one.original.similarity, one.label) for one in report.copies]
        write_rows(path, ("uri", "original", "similarity", "label"), rows)
    else:
        write_rows(path, ("group", "uri", "similarity", "label", "split"), _group_rows(report.groups))


def _group_rows(groups: Sequence[Sequence[GroupedImage]]) -> Iterator[tuple[int, str, float, str, str]]:
    for number, group in enumerate(groups, 1):
        for image in group:
            yield number, image.uri, image.similarity, image.label, image.split
