"""What training reads: activations from a cache, or images decoded as they are needed; in batches, one read ahead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from features_cache import CacheFile
from pipeline.arrays import Float32Array, IntArray
from pipeline.backbones.aliases import INPUT
from pipeline.backbones.thaw_line import LayerNode
from pipeline.errors import SourceError, UnreadableImageError
from pipeline.images.ahead import map_ahead
from pipeline.images.loader import default_workers, digest_of, readers_of
from pipeline.images.resize import prepare
from pipeline.images.sources.registry import ImageSource
from pipeline.spec import Preprocessing

Inputs = tuple[Tensor, ...]
"""The arguments of `ThawedNetwork.forward`: pixels, or activations and, for a ``direct`` top, the small image."""
Files = tuple[CacheFile, CacheFile | None]
_SAMPLE_BATCH = 32
_KEPT_BYTES = 1 << 30
"""As many plain images are kept in memory as fit into this."""


class InputReader(Protocol):
    """Reads the inputs of some rows."""

    def read(self, rows: IntArray, view: int | None) -> Inputs:
        """Return the inputs of `rows` (k,): of the plain images, or of the augmented view of number `view`."""


class CachedActivations:
    """Activations at the thaw line, read from the cache's memory map.

    `line` has the shape and layout of the layer's activations. Augmented views are used in turn, so that training shows
    all of them equally often.
    """

    def __init__(self, layer: str, line: LayerNode, plain: Files, views: Sequence[Files] = ()) -> None:
        self.layer, self.line, self.plain, self.views = layer, line, plain, views

    def read(self, rows: IntArray, view: int | None) -> Inputs:
        """Return float32 activations (k, ...) in the line's shape, and the small images (k, 3072) if there are any."""
        file, image = self.plain if view is None else self.views[view % len(self.views)]
        activations = unflattened(_features(file, self.layer, rows), self.line)
        return (activations,) if image is None else (activations, torch.from_numpy(_features(image, INPUT, rows)))


def _features(file: CacheFile, layer: str, rows: IntArray) -> Float32Array:
    return file.features(layer, rows).astype(np.float32, copy=False)


def unflattened(flat: Float32Array, line: LayerNode) -> Tensor:
    """Undo the pool that kept all activations: (k, d) to (k, *shape), maps channels-last in memory.

    This is all numpy: torch would start OpenMP threads for the thread that reads ahead, and slow down the training.
    """
    if line.layout.kind in ("vector", "tokens"):
        return torch.from_numpy(flat.reshape(-1, *line.shape))
    if line.layout.kind == "map_last":
        height, width, channels = line.shape
        return torch.from_numpy(flat.reshape(-1, channels, height, width).transpose(0, 2, 3, 1))
    maps = np.ascontiguousarray(flat.reshape(-1, *line.shape).transpose(0, 2, 3, 1))
    return torch.from_numpy(maps.transpose(0, 3, 1, 2))


class DecodedImages:
    """Pixels of the source's images, decoded by `workers` threads (by default one for each core).

    `preprocessing` is that of plain images, `augment` (see `pipeline.images.augment`) how views differ from them. Plain
    images are decoded once, as far as memory for them goes; every view is decoded anew. If `digests` (n, 16) of the
    source's items are given, an image that has other bytes by now is an error.
    """

    def __init__(
        self,
        source: ImageSource,
        preprocessing: Preprocessing,
        augment: str,
        workers: int | None = None,
        digests: NDArray[np.uint8] | None = None,
    ) -> None:
        self._source, self._preprocessing, self._augment, self._digests = source, preprocessing, augment, digests
        workers = workers or default_workers()
        self._pool = ThreadPoolExecutor(readers_of(source, workers) if source.remote else workers)
        height, width = preprocessing.size
        self._kept: dict[int, np.ndarray] = {}
        self._most_kept = _KEPT_BYTES // (height * width * 3)

    def read(self, rows: IntArray, view: int | None) -> Inputs:
        """Return uint8 pixels (k, h, w, 3); raises `SourceError` if an image is not the one that it was."""
        if view is None:
            pixels = self._pool.map(self._plain, rows.tolist())
        else:
            spec = self._preprocessing.viewed(self._augment, view)
            pixels = self._pool.map(lambda row: self._decode(row, spec), rows.tolist())
        return (torch.from_numpy(np.stack(list(pixels))),)

    def _plain(self, row: int) -> np.ndarray:
        pixels = self._kept.get(row)
        if pixels is None:
            pixels = self._decode(row, self._preprocessing)
            if len(self._kept) < self._most_kept:
                self._kept[row] = pixels
        return pixels

    def _decode(self, row: int, preprocessing: Preprocessing) -> np.ndarray:
        item = self._source.items[row]
        try:
            data = self._source.read(item)
            if self._digests is not None and digest_of(data) != self._digests[row].tobytes():
                raise UnreadableImageError("it has other bytes")
            return prepare(data, preprocessing)
        except UnreadableImageError as error:
            raise SourceError(f"{item.uri} changed during training: {error}; run the same command again") from error


class Subset:
    """The rows of one split, with their labels (n, ...), read in batches.

    `rows` (n,) are numbers of rows in the reader. A `seed` shuffles every epoch in its own way. If `augmented`, each
    epoch reads another view instead of the plain images.
    """

    def __init__(
        self,
        reader: InputReader,
        rows: IntArray,
        labels: NDArray[Any],
        batch_size: int,
        seed: int | None = None,
        *,
        augmented: bool = False,
    ) -> None:
        self.reader, self.rows, self.labels, self.seed, self.augmented = reader, rows, labels, seed, augmented
        self.n_batches = batch_count(len(rows), batch_size)

    def sample(self, most: int) -> Subset:
        """Return at most `most` of these rows, evenly spaced, plain and in order."""
        chosen = np.linspace(0, len(self.rows) - 1, min(most, len(self.rows))).astype(np.int64)
        return Subset(self.reader, self.rows[chosen], self.labels[chosen], _SAMPLE_BATCH)

    def batches(self, epoch: int = 0) -> Iterator[tuple[Inputs, Tensor]]:
        """Return the inputs and labels (k,) of each batch of an epoch, counted from 0; the next batch is read ahead."""
        order = np.arange(len(self.rows))
        if self.seed is not None:
            order = np.random.default_rng([self.seed, epoch]).permutation(order)
        view = (self.seed or 0) * 100_000 + epoch if self.augmented else None

        read = partial(self.read_batch, view=view)
        return map_ahead(read, np.array_split(order, self.n_batches), threads=1, depth=1)

    def read_batch(self, index: IntArray, view: int | None) -> tuple[Inputs, Tensor]:
        """Return the inputs and labels of the rows at `index` (k,) of this subset."""
        return self.reader.read(self.rows[index], view), torch.from_numpy(self.labels[index])


def batch_count(rows: int, batch_size: int) -> int:
    """Return how many batches `rows` make if they are evened out, so that their sizes differ by one at most.

    No batch is larger than `batch_size`, except that three rows are one batch where `batch_size` is 2: a batch has one
    row only if `batch_size` is 1.

    Examples
    --------
    >>> batch_count(33, 32)  # 17 and 16 rows, not 32 and 1
    2
    """
    count = max(1, -(-rows // batch_size))
    return count if batch_size == 1 or rows // count > 1 else max(1, rows // 2)
