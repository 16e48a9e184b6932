"""Give other images the features that a cache file holds: through the same decoding, network, layer and pooling."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import gettempdir
from typing import NamedTuple

import numpy as np

from features_cache import DONE, CacheError, CacheFile, open_cache, scratch_folder
from pipeline.arrays import Float32Array, IntArray
from pipeline.errors import SourceError
from pipeline.extract import extract
from pipeline.images.sources.registry import ImageSource, Item, Items, open_source
from pipeline.neighbours.rows import UnitRows
from pipeline.results import Progress
from pipeline.spec import DECODE_POLICY, LayerSpec


class LikeFeatures(NamedTuple):
    """Features of a source's images, which of them could be read, and why the others could not.

    Attributes
    ----------
    features : (k, d) float32
        Of length 1, see `UnitRows`.
    read : (k,) int64
        Which items they are of.
    reasons : dict of int to str
        By item.
    notes : list of str
    """

    features: Float32Array
    read: IntArray
    reasons: dict[int, str]
    notes: list[str]


def features_like(
    file: CacheFile,
    layer: str,
    images: ImageSource,
    *,
    engine: str = "auto",
    device: str = "auto",
    progress: Progress | None = None,
) -> LikeFeatures:
    """Extract images as a cache file was extracted, into a temporary folder.

    Raises
    ------
    CacheError
        The file's network would now give other features.
    ThawlineError
        As for extraction.
    """
    request = file.request
    try:
        spec = LayerSpec.from_json(file.layer(layer).spec)
    except ValueError as error:
        raise CacheError(f"{file.path} does not say how {layer} was extracted: {error}") from error
    if spec.decode != DECODE_POLICY or "backbone" not in request or request.get("view") is not None:
        raise CacheError(
            f"{file.path} holds augmented views, or was made by older decoding rules; extract the images again"
        )
    with scratch_folder(gettempdir()) as folder:
        (result,) = extract(
            images,
            [request["backbone"]],
            [layer],
            spec.pool,
            folder,
            precision=spec.precision,
            store=spec.store,
            size=request.get("size"),
            white=spec.preprocessing.white,
            engine=engine,
            device=device,
            expect=[spec],
            progress=progress,
        )
        made = open_cache(result.path)
        read = np.flatnonzero(made.states == DONE)
        reasons = dict(enumerate(made.reasons.tolist()))
        return LikeFeatures(UnitRows(made, layer, read).take(slice(None)), read, reasons, result.notes)


def open_images(paths: Sequence[str | Path]) -> ImageSource:
    """List the images of several sources as one; their names are then the path with which each was found."""
    sources = [open_source(path) for path in paths]
    if len(sources) == 1:
        return sources[0]
    found: dict[str, tuple[ImageSource, Item]] = {}
    for path, source in zip(paths, sources, strict=True):
        for item in source.items:
            name = str(path) if Path(path).is_file() and len(source.items) == 1 else f"{path}/{item.uri}"
            found[name] = source, item

    def read(item: Item) -> bytes:
        source, original = found[item.uri]
        return source.read(original)

    items = sorted(item._replace(uri=name, label=-1) for name, (_, item) in found.items())
    return ImageSource("images", "several sources", (), Items.of(items), read)


def source_of(file: CacheFile) -> ImageSource:
    """Open the source that a cache file was extracted from.

    Raises
    ------
    SourceError
        It is not where it was.
    """
    location = file.handles.get("location", "")
    try:
        return open_source(location)
    except SourceError as error:
        raise SourceError(f"the images of {file.path.name} are needed, but are not where they were: {error}") from error
