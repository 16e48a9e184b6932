"""The distinct images of one cached layer as rows of length 1, read in blocks so that memory stays bounded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features_cache import DONE, AmbiguousCacheError, CacheError, CacheFile, Catalog, digest_keys
from pipeline.arrays import Float32Array, IntArray, StrArray
from pipeline.errors import FitError
from pipeline.evaluation.rows import check_readable, not_finite, stands_for
from pipeline.extraction.inspection import only_layer
from pipeline.spec import DEFAULT_LAYER

BLOCK = 4096
"""Rows that are read at once."""


class UnitRows:
    """Features of some rows of a layer, each divided by its length; a row of zeros stays one.

    Their inner products are the cosines of the angles between features: the similarity of the images, at most 1.

    Parameters
    ----------
    file : CacheFile
    layer : str
    rows : (n,) int64
        Finished rows of the file.
    """

    def __init__(self, file: CacheFile, layer: str, rows: IntArray) -> None:
        self.file, self.layer, self.rows = file, layer, rows
        self.dim = file.layer(layer).dim

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: IntArray | slice) -> Float32Array:
        """Read the rows `index` (k,) as a new array (k, dim).

        Raises
        ------
        FitError
            Some of the features are NaN or infinite.
        """
        numbers = self.rows[index]
        contiguous = len(numbers) and numbers[-1] - numbers[0] + 1 == len(numbers) and (np.diff(numbers) == 1).all()
        where = slice(int(numbers[0]), int(numbers[-1]) + 1) if contiguous else numbers
        found = np.array(self.file.features(self.layer, where), np.float32)
        lengths = np.sqrt(np.einsum("nd,nd->n", found, found, dtype=np.float64))
        if not np.isfinite(lengths).all():
            bad = self.file.uris[numbers[~np.isfinite(lengths)]]
            precision = str(self.file.layers[self.layer].spec.get("precision"))
            raise not_finite(f"{self.layer} of {self.file.path.name}", bad, len(numbers), {precision})
        found /= np.where(lengths > 0, lengths, 1)[:, None].astype(np.float32)
        return found

    def blocks(self) -> Iterator[tuple[int, Float32Array]]:
        """Yield the first index of each block of at most `BLOCK` rows, and the rows."""
        for start in range(0, len(self.rows), BLOCK):
            yield start, self.take(slice(start, start + BLOCK))


class DistinctImages(UnitRows):
    """The finished images of a cache file, those of equal bytes once.

    Attributes
    ----------
    copies : (m,) int64
        For each finished row of the file, in order, the index of its image among the distinct ones.
    done : (m,) int64
        These rows.
    """

    def __init__(self, file: CacheFile, layer: str) -> None:
        file.check_columns()
        check_readable(file)
        self.done = np.flatnonzero(file.states == DONE)
        if not len(self.done):
            raise FitError(f"no image of {file.path} is extracted yet; run the same extract again")
        if file.layer(layer).shape:
            raise FitError(f"layer {layer} was extracted with pool none; extract it with another pool, such as avg")
        _, first, copies = np.unique(digest_keys(file.digests[self.done]), return_index=True, return_inverse=True)
        order = np.argsort(first)  # distinct images in the order of the file
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        self.copies: IntArray = rank[copies]
        super().__init__(file, layer, self.done[first[order]])

    @property
    def keys(self) -> NDArray[np.bytes_]:
        """Digest of each image (n,)."""
        return digest_keys(self.file.digests[self.rows])

    @cached_property
    def uris(self) -> StrArray:
        """Name of each image (n,); of equal ones, the first."""
        return self.file.uris[self.rows]

    def label(self, index: int) -> str:
        """Return the class name of an image, ``""`` if it has none."""
        return label_of(self.file, int(self.rows[index]))


def label_of(file: CacheFile, row: int) -> str:
    """Return the class name of a row, ``""`` if it has none."""
    number = int(file.labels[row])
    return file.classes[number] if number >= 0 else ""


def find_layer(
    catalog: Catalog, layer: str | None, source: str | None, backbone: str | None, pool: str | None
) -> tuple[CacheFile, str]:
    """Return the one file that fits, and its layer: the named one, by default `penultimate` or the only one.

    Raises
    ------
    CacheError
        There is no such file or layer, or several fit.
    FitError
        The name stands for several layers.
    """
    fitting = catalog.fitting(source, backbone, pool)
    if layer is None and any(DEFAULT_LAYER in file.layers for file in fitting):
        layer = DEFAULT_LAYER
    if layer is not None:
        layer = one_layer(fitting, layer)
    file = catalog.find(layer, source, backbone, pool)
    try:
        return file, layer or only_layer(file)
    except AmbiguousCacheError as error:
        raise AmbiguousCacheError(f"{error}; the last is usually best") from error


def one_layer(files: Sequence[CacheFile], name: str) -> str:
    """Return the layer that a name or alias stands for; raise `FitError` if it stands for several."""
    layer, *more = stands_for(files, name)
    if more:
        raise FitError(f"expected one layer to compare, got several: {', '.join([layer, *more])}; name one of them")
    return layer


def require_same_features(first: CacheFile, second: CacheFile, layer: str) -> None:
    """Refuse two files whose features of a layer were not extracted in the same way, or that are one file."""
    if first.path.resolve() == second.path.resolve():
        raise CacheError(f"expected two sets of images, but both caches are {first.path}; name two files")
    one, other = first.layer(layer), second.layer(layer)
    if one.fingerprint != other.fingerprint:
        differ = [f"{key} {one.spec.get(key)} and {other.spec.get(key)}" for key in _changed(one.spec, other.spec)]
        raise FitError(
            f"features of {layer} can be compared only if they were extracted in the same way, but these differ in "
            f"{'; '.join(differ) or 'their fingerprints'}; extract one of the sets again with the options of the other"
        )


def _changed(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [key for key in dict.fromkeys([*one, *other]) if one.get(key) != other.get(key)]


def missing_notes(*files: CacheFile) -> list[str]:
    """Return what is missing of caches in parts: an answer over fewer images than there are must say so."""
    return [file.missing_note for file in dict.fromkeys(files) if file.missing_note]
