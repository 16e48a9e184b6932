"""What training reads: activations from a cache, or pictures decoded as they are needed; in batches, one ahead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from features_cache import CacheFile
from pipeline.arrays import IntArray
from pipeline.backbones.layers import INPUT
from pipeline.backbones.thaw_line import LayerNode
from pipeline.errors import SourceError, UnreadableImageError
from pipeline.images.loader import default_workers
from pipeline.images.resize import prepare
from pipeline.images.sources.registry import ImageSource
from pipeline.spec import Preprocessing

Input = tuple[Tensor, ...]
"""What a `Network` takes: pixels, or activations and perhaps the small image."""
_STEP = 32
_KEPT_BYTES = 1 << 30
"""Pictures without augmentation are decoded once and kept, where all of them take no more memory than this."""


class Reader(Protocol):
    """Gives the input for some rows of the source; `view` numbers augmented views, None is the plain image."""

    def read(self, rows: IntArray, view: int | None) -> Input:
        """Return the input for `rows` (k,)."""


class Activations:
    """Activations at the thaw line, straight from the cache's memory map.

    Parameters
    ----------
    file : CacheFile
        Holds the layer.
    layer : str
        Its name.
    place : LayerNode
        Shape and layout of its activations.
    image : CacheFile or None
        Holds the small image (``input``) of the same rows, where the top reads it.
    """

    def __init__(self, file: CacheFile, layer: str, place: LayerNode, image: CacheFile | None) -> None:
        self.file, self.layer, self.place, self.image = file, layer, place, image

    def read(self, rows: IntArray, view: int | None) -> Input:
        """Return float32 activations (k, ...) in the shape of the line, and the small image (k, 3072) if asked for."""
        activations = unflattened(_rows(self.file, self.layer, rows), self.place)
        if self.image is None:
            return (activations,)
        return activations, torch.from_numpy(_rows(self.image, INPUT, rows))


class Views:
    """Plain images as one reader has them, augmented views of them as others do.

    Parameters
    ----------
    plain : Reader
    views : sequence of Reader
        The view that is asked for counts through them, again and again: every image shows all of them equally often.
    """

    def __init__(self, plain: Reader, views: Sequence[Reader]) -> None:
        self.plain, self.views = plain, views

    def read(self, rows: IntArray, view: int | None) -> Input:
        """Return what the reader of this view gives."""
        return (self.plain if view is None else self.views[view % len(self.views)]).read(rows, None)


def _rows(file: CacheFile, layer: str, rows: IntArray) -> NDArray[np.float32]:
    return file.matrix(layer)[rows].astype(np.float32, copy=False)


def unflattened(flat: NDArray[np.float32], place: LayerNode) -> Tensor:
    """Undo the pooling ``flatten``: (k, d) to (k, *shape), maps channels-last in memory.

    All in numpy: torch would start OpenMP threads for the thread that reads ahead, in the way of those that train.
    """
    if place.layout == "vector":
        return torch.from_numpy(flat)
    if place.layout == "map_last":
        height, width, channels = place.shape
        return torch.from_numpy(flat.reshape(-1, channels, height, width).transpose(0, 2, 3, 1))
    maps = np.ascontiguousarray(flat.reshape(-1, *place.shape).transpose(0, 2, 3, 1))
    return torch.from_numpy(maps.transpose(0, 3, 1, 2))


class Pictures:
    """Decoded pictures, each view decoded anew.

    Parameters
    ----------
    source : ImageSource
    preprocessing : Preprocessing
        Of plain images.
    augment : str
        What views are made of, see `pipeline.images.augment`; ``"none"`` for plain images only.
    workers : int, optional
        Decoding threads; one for each core by default.
    """

    def __init__(
        self, source: ImageSource, preprocessing: Preprocessing, augment: str, workers: int | None = None
    ) -> None:
        self._source, self._preprocessing, self._augment = source, preprocessing, augment
        self._pool = ThreadPoolExecutor(workers or default_workers())
        height, width = preprocessing.size
        self._kept: dict[int, np.ndarray] = {}
        self._most = _KEPT_BYTES // (height * width * 3)

    def read(self, rows: IntArray, view: int | None) -> Input:
        """Return uint8 pixels (k, h, w, 3).

        Raises
        ------
        SourceError
            An image that could be read a moment ago cannot be any more.
        """
        if view is None:
            return (torch.from_numpy(np.stack(list(self._pool.map(self._plain, rows.tolist())))),)
        spec = self._preprocessing.viewed(self._augment, view)
        return (torch.from_numpy(np.stack(list(self._pool.map(lambda row: self._decode(row, spec), rows.tolist())))),)

    def _plain(self, row: int) -> np.ndarray:
        if row not in self._kept:
            pixels = self._decode(row, self._preprocessing)
            if len(self._kept) >= self._most:
                return pixels
            self._kept[row] = pixels
        return self._kept[row]

    def _decode(self, row: int, preprocessing: Preprocessing) -> np.ndarray:
        item = self._source.items[row]
        try:
            return prepare(self._source.read(item), preprocessing)
        except UnreadableImageError as error:
            raise SourceError(
                f"{item.uri} changed while it was trained on: {error}; run the same command again"
            ) from error


class Part(Dataset[Tensor]):
    """Rows of one split with their labels, as batches; iterating it again gives the next epoch.

    Parameters
    ----------
    reader : Reader
    rows, labels : (n,) int64
        Row numbers in the reader, and class numbers.
    batch_size : int
        Batches are evened out, so some hold one more.
    seed : int or None
        Shuffles every epoch in its own way; None keeps the order.
    augmented : bool
        Whether each epoch reads another view.

    Attributes
    ----------
    epoch : int
        Number of the epoch that iterating gives next, from 0.
    """

    def __init__(
        self, reader: Reader, rows: IntArray, labels: IntArray, batch_size: int, seed: int | None, *, augmented: bool
    ) -> None:
        self.reader, self.rows, self.labels, self.seed, self.augmented = reader, rows, labels, seed, augmented
        self.count = batch_count(len(rows), batch_size)
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def smallest(self) -> int:
        """Rows of the smallest batch."""
        return len(self.rows) // self.count

    def take(self, most: int) -> Part:
        """Return at most `most` of these rows, evenly chosen, plain and in order."""
        chosen = np.linspace(0, len(self.rows) - 1, min(most, len(self.rows))).astype(np.int64)
        return Part(self.reader, self.rows[chosen], self.labels[chosen], _STEP, None, augmented=False)

    def __iter__(self) -> Iterator[tuple[Input, Tensor]]:
        """Yield inputs and labels, the next batch being read meanwhile."""
        order = np.arange(len(self.rows))
        if self.seed is not None:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(order)
        view = None if not self.augmented else (self.seed or 0) * 100_000 + self.epoch
        self.epoch += 1
        batches = np.array_split(order, self.count)
        with ThreadPoolExecutor(1) as ahead:
            coming = ahead.submit(self.reader.read, self.rows[batches[0]], view)
            for number, batch in enumerate(batches):
                inputs = coming.result()
                if number + 1 < len(batches):
                    coming = ahead.submit(self.reader.read, self.rows[batches[number + 1]], view)
                yield inputs, torch.from_numpy(self.labels[batch])


def batch_count(rows: int, batch_size: int) -> int:
    """Return how many even batches `rows` make: of `batch_size` at most, but of one row only if that is asked for."""
    count = max(1, -(-rows // batch_size))
    return count if batch_size == 1 or rows // count > 1 else max(1, rows // 2)
