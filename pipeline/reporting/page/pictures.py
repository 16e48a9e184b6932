"""What the report shows of the images: mistakes, duplicates across splits, and a map of their features."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features_cache import DONE, CacheFile
from pipeline.comparing.features import Features
from pipeline.errors import UnreadableImageError
from pipeline.evaluation.leaks import find_leaks
from pipeline.evaluation.predictions import Predictions
from pipeline.images.decode import decode
from pipeline.images.sources.registry import ImageSource, Item
from pipeline.reporting.charts.embedding import neighbour_map, principal_components
from pipeline.reporting.page.template import data_url

SIDE = 96  # longer side of a thumbnail, pixels
MOST_PAIRS = 6
MOST_EACH = 4
MOST_WORST = 12
MOST_LEAKS = 12
MOST_POINTS = 1000


@dataclass(frozen=True)
class Thumbnail:
    """A small picture of one image as a data URL, ``""`` if it cannot be read any more, and a note below its name."""

    data: str
    uri: str
    note: str


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
        return data_url(image)


def worst_confusions(predictions: Predictions, classes: Sequence[str], album: Album) -> list[dict[str, Any]]:
    """Return the pairs of classes that are mistaken most often, with images of the most confident mistakes."""
    wrong = np.flatnonzero(~predictions.right)
    pairs = Counter(zip(predictions.y_true[wrong].tolist(), predictions.y_pred[wrong].tolist(), strict=True))
    found = []
    for (true, predicted), count in pairs.most_common(MOST_PAIRS):
        rows = wrong[(predictions.y_true[wrong] == true) & (predictions.y_pred[wrong] == predicted)]
        sure = predictions.probability
        if sure is not None:
            rows = rows[np.argsort(-sure[rows], kind="stable")]
        notes = ["" if sure is None else f"p = {sure[row]:.2f}" for row in rows[:MOST_EACH]]
        images = [album.thumbnail(str(predictions.uris[row]), note) for row, note in zip(rows, notes, strict=False)]
        total = int((predictions.y_true == true).sum())
        names = {"true": classes[true], "predicted": classes[predicted]}
        found.append(names | {"count": count, "total": total, "images": images})
    return found


def most_wrong(predictions: Predictions, labels: Sequence[str], album: Album) -> list[Thumbnail]:
    """Return the images with most wrong labels, and which these are."""
    wrong = predictions.y_true != predictions.y_pred
    rows = [row for row in np.argsort(-wrong.sum(axis=1), kind="stable")[:MOST_WORST].tolist() if wrong[row].any()]

    def note(row: int) -> str:
        sides = {"missed": wrong[row] & predictions.y_true[row], "added": wrong[row] & predictions.y_pred[row]}
        named = {
            side: ", ".join(labels[number] for number in np.flatnonzero(own).tolist()) for side, own in sides.items()
        }
        return "; ".join(f"{side} {names}" for side, names in named.items() if names)

    return [album.thumbnail(str(predictions.uris[row]), note(row)) for row in rows]


def farthest_off(predictions: Predictions, album: Album) -> list[Thumbnail]:
    """Return the images whose numbers are predicted worst, with these numbers."""
    errors = np.abs(predictions.y_pred - predictions.y_true)
    return [
        album.thumbnail(
            str(predictions.uris[row]),
            f"true {predictions.y_true[row]:.4g}, predicted {predictions.y_pred[row]:.4g}",
        )
        for row in np.argsort(-errors, kind="stable")[:MOST_WORST].tolist()
        if errors[row]
    ]


def leaks(file: CacheFile, images: ImageSource, album: Album) -> tuple[int, list[tuple[Thumbnail, Thumbnail]]]:
    """Return how many images of the test (or val) split are also in training, and some of the pairs.

    Labels and splits are those of `images`, which may be of a table.
    """
    items = {item.uri: item for item in images.items}
    known = [items.get(uri, Item(uri)) for uri in file.uris.tolist()]
    splits = np.array([item.split for item in known])
    usable = (file.states == DONE) & (np.array([item.label for item in known]) >= 0)
    sides = {name: np.flatnonzero(usable & (splits == name)) for name in ("train", "val", "test")}
    if not any(len(sides[name]) for name in ("val", "test")):
        return 0, []  # splits drawn by seed keep equal images together
    sides["train"] = np.flatnonzero(usable & ((splits == "train") | (splits == "")))
    found = find_leaks(sides["train"], sides["val"], sides["test"], np.asarray(file.digests))
    names = [(str(file.uris[a]), splits[a], str(file.uris[b]), splits[b]) for a, b in found[:MOST_LEAKS]]
    pairs = [(album.thumbnail(a, str(of_a)), album.thumbnail(b, str(of_b) or "train")) for a, of_a, b, of_b in names]
    return len(found), pairs


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
