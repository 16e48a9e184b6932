"""Find the images of a cache that look most like given images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from features_cache import DONE, CacheFile, Catalog
from pipeline.arrays import Float32Array, IntArray
from pipeline.errors import FitError
from pipeline.extraction.object_store import open_catalog
from pipeline.images.sources.registry import ImageSource
from pipeline.neighbours.index import EXACT_ROWS, index_of
from pipeline.neighbours.like import LikeFeatures, features_like, open_images
from pipeline.neighbours.nearest import nearest_rows
from pipeline.neighbours.rows import DistinctImages, find_layer, missing_notes
from pipeline.neighbours.table import write_rows
from pipeline.results import Neighbour, Progress, SimilarImages


@dataclass(frozen=True)
class SimilarReport:
    """What was found for each image, in their order, and what a user should know.

    Parameters
    ----------
    found : list of SimilarImages
    layer : str
        On which images were compared.
    rows : int
        How many different images were searched.
    recall : float
        Share of the nearest images that the search finds: 1 if it is exact, else as measured on images of the cache.
    notes : list of str
    file : CacheFile
        What was searched.
    images : ImageSource or None
        The images looked for; None if they are images of the cache.
    """

    found: list[SimilarImages]
    layer: str
    rows: int
    recall: float
    notes: list[str]
    file: CacheFile
    images: ImageSource | None


def similar(
    cache: str | Path | Catalog,
    images: Sequence[str | Path],
    layer: str | None = None,
    source: str | None = None,
    backbone: str | None = None,
    pool: str | None = None,
    count: int = 10,
    *,
    engine: str = "auto",
    device: str = "auto",
    progress: Progress | None = None,
) -> SimilarReport:
    """Find the `count` images of a cache that are most like each of `images`.

    Images are alike if the angle between their features is small. Images of equal bytes count once. Search is exact up
    to 100,000 images; in larger caches it goes through an index, which is built once and kept beside the cache file.

    Parameters
    ----------
    cache : str, Path or Catalog
        A folder of cache files, or one file.
    images : sequence of str or Path
        Names of images of the cache; or else images, folders, or other sources, whose features are extracted as those
        of the cache were.
    layer : str, optional
        By default ``penultimate``, or the only layer.
    source, backbone, pool : str, optional
        Select a file if the cache holds several.
    count : int, default 10
        An image of the cache does not find itself.
    engine, device : str, default "auto"
        As for extraction.
    progress : callable, optional
        As for extraction.

    Raises
    ------
    CacheError
        If the cache or the layer cannot be found, or an index is needed and faiss is not installed.
    SourceError
        If there are no such images.
    FitError
        If features are not finite.

    Examples
    --------
    >>> from pipeline.extract import extract
    >>> caches = extract("photos", layers=["blocks.1"], size=32)
    >>> similar("thawline-cache", ["cat/0.png"], count=1).found[0].neighbours
    [Neighbour(uri='cat/...', similarity=0.9..., label='cat')]
    """
    if not images:
        raise FitError("expected at least one image to look for, got none")
    file, layer = find_layer(open_catalog(cache), layer, source, backbone, pool)
    rows = DistinctImages(file, layer)
    own = _rows_named(file, list(map(str, images)))
    if own is None:
        asked = open_images(images)
        names = [item.uri for item in asked.items]
        like = features_like(file, layer, asked, engine=engine, device=device, progress=progress)
        selves = np.full(len(like.read), -1)
    else:
        asked, names = None, file.uris[own].tolist()
        selves = rows.copies[np.searchsorted(rows.done, own)]
        like = LikeFeatures(rows.take(selves), np.arange(len(own)), {}, [])
    wanted = count + (own is not None)
    if len(rows) > EXACT_ROWS:
        index = index_of(rows)
        recall, notes = index.recall, [f"searched through an index, which finds {index.recall:.1%} of the nearest ten"]
        indices, similarities = index.nearest(like.features, wanted)
    else:
        recall, notes = 1.0, []
        indices, similarities = nearest_rows(like.features, rows, wanted)
    answers = {
        number: SimilarImages(names[number], _neighbours(rows, near, how_near, itself, count))
        for number, itself, near, how_near in zip(
            like.read.tolist(), selves.tolist(), indices, similarities, strict=True
        )
    }
    found = [answers.get(number) or SimilarImages(name, [], like.reasons[number]) for number, name in enumerate(names)]
    return SimilarReport(found, layer, len(rows), recall, [*like.notes, *notes, *missing_notes(file)], file, asked)


def _rows_named(file: CacheFile, names: Sequence[str]) -> IntArray | None:
    """Return the rows of images of the cache, None if one of the names is no finished row."""
    row_of = {uri: row for row, uri in enumerate(file.uris.tolist())}
    rows = [row_of.get(name, -1) for name in names]
    known = all(row >= 0 and file.states[row] == DONE for row in rows)
    return np.array(rows, np.int64) if known else None


def _neighbours(
    rows: DistinctImages, indices: IntArray, similarities: Float32Array, own: int, count: int
) -> list[Neighbour]:
    kept = (indices >= 0) & (indices != own)
    return [
        Neighbour(str(rows.uris[index]), float(min(similarity, 1)), rows.label(int(index)))
        for index, similarity in zip(indices[kept][:count], similarities[kept], strict=False)
    ]


def write_similar(found: Sequence[SimilarImages], path: Path) -> None:
    """Write ``image,rank,uri,similarity,label`` rows; raises `CacheError` if the file cannot be written."""
    rows = [
        (one.uri, rank, neighbour.uri, neighbour.similarity, neighbour.label)
        for one in found
        for rank, neighbour in enumerate(one.neighbours, 1)
    ]
    write_rows(path, ("image", "rank", "uri", "similarity", "label"), rows)
