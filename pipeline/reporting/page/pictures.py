"""What the report shows of the images: mistakes, duplicates across splits, and a map of their features."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from features_cache import CacheFile
from pipeline.comparing.features import Features
from pipeline.errors import UnreadableImageError
from pipeline.evaluation.leaks import find_leaks
from pipeline.evaluation.predictions import Predictions
from pipeline.images.decode import decode
from pipeline.images.sources.registry import ImageSource
from pipeline.reporting.charts.embedding import neighbour_map, principal_components

SIDE = 96
"""Longer side of a thumbnail, pixels."""
MOST_PAIRS = 6
MOST_EACH = 4
MOST_LEAKS = 12
MOST_POINTS = 1000


@dataclass(frozen=True)
class Thumbnail:
    """A small picture of one image.

    Parameters
    ----------
    data : str
        Data URL; ``""`` if the image cannot be read any more.
    uri : str
        Name of the image.
    note : str
        Text below the name.
    """

    data: str
    uri: str
    note: str


@dataclass(frozen=True)
class Confusion:
    """A class mistaken for another.

    Parameters
    ----------
    true, predicted : str
        Names of the classes.
    count, total : int
        How many images of the true class were mistaken, of how many.
    images : sequence of Thumbnail
        Some of them, the most confident mistakes first.
    """

    true: str
    predicted: str
    count: int
    total: int
    images: Sequence[Thumbnail]


@dataclass(frozen=True)
class Leaks:
    """Images of test or val that are also in training: how many, and some pairs."""

    count: int
    pairs: Sequence[tuple[Thumbnail, Thumbnail]]


class Album:
    """Makes thumbnails of one source's images, each once."""

    def __init__(self, images: ImageSource) -> None:
        self._images = images
        self._items = {item.uri: item for item in images.items}
        self._made: dict[str, str] = {}

    def thumbnail(self, uri: str, note: str = "") -> Thumbnail:
        """Return a thumbnail of an image."""
        if uri not in self._made:
            self._made[uri] = self._encode(uri)
        return Thumbnail(self._made[uri], uri, note)

    def _encode(self, uri: str) -> str:
        if uri not in self._items:
            return ""
        try:
            image = decode(self._images.read(self._items[uri]), floor=2 * SIDE).image
        except UnreadableImageError:  # it was readable when it was extracted; the page says that it is not any more
            return ""
        image.thumbnail((SIDE, SIDE))
        stream = io.BytesIO()
        image.save(stream, "WEBP", quality=72)
        return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"


def worst_confusions(predictions: Predictions, classes: Sequence[str], album: Album) -> list[Confusion]:
    """Return the pairs of classes that are mistaken most often."""
    wrong = np.flatnonzero(~predictions.right)
    pairs = Counter(zip(predictions.y_true[wrong].tolist(), predictions.y_pred[wrong].tolist(), strict=True))
    found = []
    for (true, predicted), count in pairs.most_common(MOST_PAIRS):
        rows = wrong[(predictions.y_true[wrong] == true) & (predictions.y_pred[wrong] == predicted)]
        if predictions.probability is not None:
            rows = rows[np.argsort(-predictions.probability[rows], kind="stable")]
        images = [
            album.thumbnail(str(predictions.uris[row]), _confidence(predictions, int(row))) for row in rows[:MOST_EACH]
        ]
        total = int((predictions.y_true == true).sum())
        found.append(Confusion(classes[true], classes[predicted], count, total, images))
    return found


def leaks(file: CacheFile, album: Album) -> Leaks:
    """Return the images of the source's own test (or val) split that are also in training, byte for byte."""
    usable = (file.states == 1) & (file.labels >= 0)
    sides = {name: np.flatnonzero(usable & (file.splits == name)) for name in ("train", "val", "test")}
    if not any(len(sides[name]) for name in ("val", "test")):
        return Leaks(0, [])  # splits drawn by seed keep equal images together
    sides["train"] = np.flatnonzero(usable & ((file.splits == "train") | (file.splits == "")))
    found = find_leaks(sides["train"], sides["val"], sides["test"], np.asarray(file.digests))
    names = [(str(file.uris[a]), file.splits[a], str(file.uris[b]), file.splits[b]) for a, b in found[:MOST_LEAKS]]
    return Leaks(
        len(found),
        [(album.thumbnail(a, str(of_a)), album.thumbnail(b, str(of_b) or "train")) for a, of_a, b, of_b in names],
    )


def lay_out_map(features: Features, layer: str, predictions: Predictions) -> tuple[NDArray[np.float64], Predictions]:
    """Return positions (n, 2) of at most a thousand test images by t-SNE of their features, and their predictions."""
    file = features.files[layer.split("+")[0]]
    row_of = {uri: row for row, uri in enumerate(file.uris.tolist())}
    kept = np.sort(np.random.default_rng(0).permutation(len(predictions.uris))[:MOST_POINTS])
    rows = [row_of[uri] for uri in predictions.uris[kept].tolist()]
    matrix = np.concatenate(
        [
            np.asarray(features.files[name].features(name, np.array(rows, np.int64)), np.float32)
            for name in layer.split("+")
        ],
        axis=1,
    )
    probability = None if predictions.probability is None else predictions.probability[kept]
    return neighbour_map(principal_components(matrix)[0]), Predictions(
        predictions.uris[kept], predictions.y_true[kept], predictions.y_pred[kept], probability
    )


def _confidence(predictions: Predictions, row: int) -> str:
    return "" if predictions.probability is None else f"p = {predictions.probability[row]:.2f}"
