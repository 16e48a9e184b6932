"""The layout of a cache file: rows, layers and the arrays that hold them (FORMAT.md in code)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAGIC = b"thawline-cache"
VERSION = 1

PENDING, DONE, UNREADABLE = 0, 1, 2
"""Row states: not computed yet, features on disk, image could not be decoded."""

TEXT = np.dtypes.StringDType()
"""Texts of any length in memory, which one long text does not widen."""
SPLITS = ("", "train", "val", "test")
DTYPES = {"float32": "<f4", "float16": "<f2"}
RUN_SLOTS, RUN_BYTES = 128, 4096
REASON_BYTES = 80
DIGEST_BYTES = 16

RECORD = np.dtype(
    [
        ("digest", "u1", (DIGEST_BYTES,)),
        ("size", "<i8"),
        ("mtime_ns", "<i8"),
        ("run", "<i4"),
        ("reason", f"S{REASON_BYTES}"),
    ]
)
"""The reading result of a row; `/rows/result_crc` covers these bytes in this order."""

FileLayout = dict[str, tuple[str, tuple[int, ...]]]
"""Array name to (numpy type string, shape), in file order."""


@dataclass(frozen=True)
class LayerInfo:
    """One layer of a cache file.

    Parameters
    ----------
    name : str
        Layer name; printable, without ``/``.
    dim : int
        Length of a feature vector.
    dtype : str
        ``"float32"`` or ``"float16"``, as stored.
    spec : mapping
        Everything that can change a value, as JSON; opaque here.
    fingerprint : str
        Digest of `spec`; equal fingerprints mean interchangeable features.
    shape : tuple of int
        Of the array whose values are the feature vector, in C order; empty if that is the vector itself.
    """

    name: str
    dim: int
    dtype: str
    spec: Mapping[str, Any]
    fingerprint: str
    shape: tuple[int, ...] = ()

    @property
    def row_bytes(self) -> int:
        """Bytes of one stored feature vector."""
        return self.dim * np.dtype(self.dtype).itemsize

    def to_json(self) -> dict[str, Any]:
        """Return the entry of a layer in a file's table; `features_cache.header.layer_of` reads it."""
        entry = {"name": self.name, "dim": self.dim, "dtype": self.dtype, "fingerprint": self.fingerprint}
        return entry | {"spec": dict(self.spec)} | ({"shape": self.shape} if self.shape else {})


@dataclass(frozen=True)
class Rows:
    """The images of a source as columns, one entry per image.

    Texts may be arrays of dtype `TEXT`, whose entries take only the bytes that they need.

    Parameters
    ----------
    uris : sequence of str
        POSIX-relative name of each image in its source.
    labels : ndarray of int64, shape (n,)
        Index into the class names, -1 for none.
    splits : sequence of str
        One of `SPLITS` each; empty for none.
    groups : sequence of str
        Rows of one group stay on one side of every split; empty for none.
    sizes, mtimes_ns : ndarray of int64, shape (n,)
        Bytes of the file and its modification time in nanoseconds.
    """

    uris: Sequence[str]
    labels: NDArray[np.int64]
    splits: Sequence[str]
    groups: Sequence[str]
    sizes: NDArray[np.int64]
    mtimes_ns: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.uris)


@dataclass(frozen=True)
class ArrayInfo:
    """One array of a file: byte offset, numpy type string and shape."""

    offset: int
    dtype: str
    shape: tuple[int, ...]

    @cached_property
    def row_bytes(self) -> int:
        """Size of one row in bytes."""
        return math.prod(self.shape[1:]) * np.dtype(self.dtype).itemsize

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.shape[0] * self.row_bytes

    @property
    def end(self) -> int:
        """Offset of the first byte after the array."""
        return self.offset + self.nbytes


def text_width(longest: int) -> int:
    """Return the width in bytes of a text array whose longest entry has `longest` bytes.

    It is a multiple of eight, so that all following arrays stay aligned.
    """
    return max(8, -(-longest // 8) * 8)


def lay_out_arrays(n_rows: int, n_classes: int, widths: Mapping[str, int], layers: Sequence[LayerInfo]) -> FileLayout:
    """Return all arrays of a file in file order: wide types first, so that all are aligned without gaps.

    Parameters
    ----------
    n_rows, n_classes : int
        Counts of images and of class names.
    widths : mapping
        Bytes per entry of the text arrays ``"classes"``, ``"uri"`` and ``"group"``.
    layers : sequence of LayerInfo
        In creation order.
    """
    n = (n_rows,)
    arrays: FileLayout = {
        "/classes": (f"|S{widths['classes']}", (n_classes,)),
        "/runs": (f"|S{RUN_BYTES}", (RUN_SLOTS,)),
        "/rows/label": ("<i8", n),
        "/rows/size": ("<i8", n),
        "/rows/mtime_ns": ("<i8", n),
        "/rows/digest": ("|u1", (n_rows, DIGEST_BYTES)),
        "/rows/uri": (f"|S{widths['uri']}", n),
        "/rows/group": (f"|S{widths['group']}", n),
        "/rows/split": ("|S8", n),
        "/rows/reason": (f"|S{REASON_BYTES}", n),
        "/rows/run": ("<i4", n),
        "/rows/source_crc": ("<u4", n),
        "/rows/result_crc": ("<u4", n),
    }
    arrays |= {f"/crc/{layer.name}": ("<u4", n) for layer in layers}
    by_width = sorted(layers, key=lambda layer: layer.dtype != "float32")
    arrays |= {f"/features/{layer.name}": (DTYPES[layer.dtype], (n_rows, layer.dim)) for layer in by_width}
    arrays["/rows/state"] = ("|u1", n)
    return arrays
