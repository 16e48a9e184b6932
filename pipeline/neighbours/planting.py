"""How near is a near-duplicate? Measured on the user's own images, with copies that are planted for it.

Copies of a sample of images are made by a list of edits and go through the same decoding and network. Their similarity
to the originals tells which share a threshold finds. The similarity of images to those of other groups (or else other
classes), which are no copies, tells how often it raises a false alarm.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from features_cache import DONE, CacheFile, DamagedCacheError, atomic_write, explained
from pipeline.arrays import Float32Array, StrArray
from pipeline.errors import FitError, UnreadableImageError
from pipeline.images.decode import decode
from pipeline.images.loader import digest_of
from pipeline.images.sources.registry import ImageSource, Item, Items
from pipeline.invalidation import stage_key
from pipeline.neighbours.like import features_like, source_of
from pipeline.neighbours.nearest import ROUNDING
from pipeline.neighbours.rows import DistinctImages
from pipeline.results import NearThreshold, Progress, from_json, to_json

COPIED = 100
"""Images of which copies are planted."""
COMPARED = 1000
"""Images that are compared with those of other groups, or classes."""
FALSE_ALARMS = 0.01
"""Share of images that may be at least as near to one of another group as the threshold."""
MISSED = 0.05
"""Share of planted copies that may be missed if that saves false alarms."""
SEED = 0


def _jpeg(image: Image.Image) -> bytes:
    return _encoded(image, "JPEG", quality=40)


def _encoded(image: Image.Image, kind: str = "BMP", **options: int) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _half(image: Image.Image) -> Image.Image:
    return image.resize((max(image.width // 2, 1), max(image.height // 2, 1)), Image.Resampling.LANCZOS)


def _crop(image: Image.Image) -> Image.Image:
    return image.crop((image.width // 10, image.height // 10, image.width, image.height))


def _tone(image: Image.Image) -> Image.Image:
    return ImageEnhance.Color(ImageEnhance.Brightness(image).enhance(1.25)).enhance(0.6)


EDITS: dict[str, Callable[[Image.Image], bytes]] = {
    "half the size": lambda image: _encoded(_half(image)),
    "JPEG at quality 40": _jpeg,
    "10 % cut off at the left and the top": lambda image: _encoded(_crop(image)),
    "mirrored": lambda image: _encoded(ImageOps.mirror(image)),
    "brighter and paler": lambda image: _encoded(_tone(image)),
}
"""How copies are made; each takes an RGB image and returns an image file."""


def threshold_of(
    images: DistinctImages,
    given: float | None = None,
    *,
    engine: str = "auto",
    device: str = "auto",
    progress: Progress | None = None,
) -> NearThreshold:
    """Return a given threshold as it is, or else the one that `_calibrate` finds."""
    if given is not None:
        return NearThreshold(images.layer, given)
    return _calibrate(images, engine=engine, device=device, progress=progress)


def _calibrate(
    images: DistinctImages, *, engine: str = "auto", device: str = "auto", progress: Progress | None = None
) -> NearThreshold:
    """Return the threshold for near-duplicates among the images of a cache.

    It is the highest that finds all but `MISSED` of the planted copies, but no lower than `FALSE_ALARMS` allow. What
    was found is kept beside the cache file, as long as its rows stay the same.

    Raises
    ------
    FitError
        There are fewer than two different images, or all images look the same.
    SourceError
        The images are not where they were.
    """
    if len(images) < 2:
        raise FitError(f"{images.file.path} holds a single image, or copies of one; nothing can be compared")
    path, key = _kept_at(images.file, images.layer)
    if kept := _kept(path, key):
        return kept
    planted = _planted(images, engine, device, progress)
    foreign, apart = _foreign(images)
    everything = np.concatenate(list(planted.values()))
    threshold = float(np.quantile(everything, MISSED))
    allowed = max(int(FALSE_ALARMS * len(foreign)), 2)  # one pair at least
    if len(foreign) > allowed:
        nearest = float(np.sort(foreign)[::-1][allowed])  # of the images that must be no false alarms
        if nearest > 1 - ROUNDING:
            raise FitError(
                f"images of different {apart} have the same features on {images.layer}, so it cannot tell copies from "
                "other images; use another layer, or give a threshold"
            )
        threshold = max(threshold, nearest + 2 * ROUNDING)
    least = threshold - ROUNDING  # as `near_pairs` compares
    found = NearThreshold(
        layer=images.layer,
        threshold=threshold,
        copies=len(next(iter(planted.values()))),
        recall={edit: float(np.mean(values >= least)) for edit, values in planted.items()},
        recall_all=float(np.mean(everything >= least)),
        apart=apart,
        compared=len(foreign),
        false_alarms=float(np.mean(foreign >= least)) if len(foreign) else None,
    )
    if os.access(path.parent, os.W_OK):
        with explained(path, "write"), atomic_write(path) as draft:
            draft.write_text(json.dumps({"key": key, "threshold": to_json(found)}))
    return found


def kept_threshold(file: CacheFile, layer: str) -> float | None:
    """Return the threshold that is kept beside a cache file, None if it was not measured, or rows came since."""
    try:
        kept = _kept(*_kept_at(file, layer))
    except DamagedCacheError:  # `duplicates` says so; nothing here depends on it
        return None
    return kept.threshold if kept else None


def _kept_at(file: CacheFile, layer: str) -> tuple[Path, str]:
    """Return where the threshold of a layer is kept, and the key of what it depends on."""
    done = int((file.states == DONE).sum())
    key = stage_key("near threshold", file=file.header.line.hex(), layer=layer, rows=done)
    return file.path.with_suffix(f".{layer}.near.json"), key


def _kept(path: Path, key: str) -> NearThreshold | None:
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
        return from_json(NearThreshold, found["threshold"]) if found["key"] == key else None
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise DamagedCacheError(f"{path} is damaged: delete it, and the threshold is measured again") from error


def _planted(images: DistinctImages, engine: str, device: str, progress: Progress | None) -> dict[str, Float32Array]:
    """Return the similarity of each planted copy to its original, by edit."""
    source = source_of(images.file)
    items = {item.uri: item for item in source.items}
    drawn = np.sort(np.random.default_rng(SEED).permutation(len(images))[:COPIED])
    named = [(number, str(images.uris[index])) for number, index in enumerate(drawn.tolist())]
    originals = {number: items[uri] for number, uri in named if uri in items}
    digests = {number: images.file.digests[images.rows[drawn[number]]].tobytes() for number in originals}
    copies = [Item(f"{number:04d}/{edit}", size=0) for number in originals for edit in EDITS]
    if not copies:
        raise FitError(f"the images of {images.file.path.name} are not in {source.location} any more; extract again")

    def read(item: Item) -> bytes:
        number, edit = item.uri.split("/")
        data = source.read(originals[int(number)])
        if digest_of(data) != digests[int(number)]:
            raise UnreadableImageError("it has other bytes than when it was extracted")
        return EDITS[edit](decode(data).image)

    made = ImageSource("planted copies", source.location, (), Items.of(sorted(copies)), read)
    like = features_like(images.file, images.layer, made, engine=engine, device=device, progress=progress)
    if not len(like.read):
        raise FitError(f"no image of {images.file.path.name} can be read as it was extracted; extract again")
    of, edits = zip(*(made.items[number].uri.split("/") for number in like.read.tolist()), strict=True)
    truth = images.take(drawn[np.array(of, np.int64)])
    similarity = np.einsum("nd,nd->n", truth, like.features)
    names = np.array(edits)
    return {edit: similarity[names == edit] for edit in EDITS}


def _foreign(images: DistinctImages) -> tuple[Float32Array, str]:
    """Return how near images are to the nearest of another group, or else class, and which of the two tells."""
    apart, names = _units(images)
    known = np.flatnonzero(names != "")
    if len(np.unique(names[known])) < 2:
        return np.empty(0, np.float32), ""
    drawn = np.sort(np.random.default_rng(SEED + 1).permutation(known)[:COMPARED])
    queries, nearest = images.take(drawn), np.full(len(drawn), -1, np.float32)
    for start, block in images.blocks():
        others = names[start : start + len(block)]
        products = queries @ block.T
        products[(others[None] == names[drawn][:, None]) | (others == "")[None]] = -1
        nearest = np.maximum(nearest, products.max(axis=1))
    return nearest, apart


def _units(images: DistinctImages) -> tuple[str, StrArray]:
    """Return what tells images apart, and its name for each image, ``""`` for none."""
    file = images.file
    groups = file.groups[images.rows]
    if len(np.unique(groups[groups != ""])) > 1:
        return "groups", groups
    return "classes", np.array([*file.classes, ""])[file.labels[images.rows]]
