"""Convert values between Python and their form on disk."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from features_cache.errors import CacheError
from features_cache.layout import DIGEST_BYTES, DTYPES, REASON_BYTES, RECORD, LayerInfo, text_width

_CHUNK = 1 << 15  # texts that are Python objects at once


def parse_json(content: bytes | str) -> Any:
    """Return the value of strict JSON; raises `ValueError` for anything else.

    NaN, infinities, numbers too large for a float and lone surrogates, which Python's own reader takes, are refused:
    they could not be written again. (Surrogates that stand for bytes of a file's name can.)
    """

    def finite(text: str) -> float:
        if not math.isfinite(value := float(text)):
            raise ValueError(f"expected a finite number, got {text:.20}")
        return value

    def whole(text: str) -> int:
        finite(text)
        return int(text)

    try:
        value = json.loads(content, parse_constant=finite, parse_float=finite, parse_int=whole)
        json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogateescape")
        return value
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected JSON: {error}") from None


def stored_features(values: ArrayLike, layer: LayerInfo, count: int) -> NDArray[np.floating]:
    """Return `values` in the layer's dtype on disk.

    Parameters
    ----------
    values : array_like of float32, shape (count, layer.dim)
        Features.
    layer : LayerInfo
        Where they belong.
    count : int
        Rows expected.

    Raises
    ------
    CacheError
        The shape is wrong, or a finite value is too large for float16.
    """
    if np.shape(values) != (count, layer.dim):
        raise CacheError(f"layer {layer.name}: expected shape {(count, layer.dim)}, got {np.shape(values)}")
    try:
        with np.errstate(over="raise"):
            return np.ascontiguousarray(values, DTYPES[layer.dtype])
    except FloatingPointError:
        largest = np.nanmax(np.abs(np.asarray(values)))
        raise CacheError(
            f"layer {layer.name}: a value of {largest:.4g} is too large for float16 (65504); store float32 instead"
        ) from None


@cache
def _float16_values() -> NDArray[np.float32]:
    return np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


def as_float32(stored: NDArray[np.floating]) -> NDArray[np.float32]:
    """Return stored features as float32; unchanged if they are, and from float16 in half the time that numpy takes."""
    if stored.dtype != np.float16:
        return stored.astype(np.float32, copy=False)
    return _float16_values().take(stored.view(np.uint16))


def records(
    digests: ArrayLike, sizes: NDArray[np.int64], mtimes_ns: NDArray[np.int64], run: int, reason: str = ""
) -> NDArray[np.void]:
    """Return the reading results of k images as an array of `layout.RECORD`.

    Parameters
    ----------
    digests : array_like of uint8, shape (k, 16)
    sizes, mtimes_ns : ndarray of int64, shape (k,)
        From the source's listing.
    run : int
    reason : str, default ""
    """
    found = np.zeros(len(sizes), RECORD)
    if np.shape(digests) != found["digest"].shape:
        raise CacheError(
            f"digest of {len(found)} rows: expected shape {found['digest'].shape}, got {np.shape(digests)}"
        )
    found["digest"], found["size"], found["mtime_ns"], found["run"] = digests, sizes, mtimes_ns, run
    found["reason"] = _cut(" ".join(reason.split()))
    return found


def _cut(text: str) -> bytes:
    """Return `text` as UTF-8 of at most `REASON_BYTES` bytes, cut between characters."""
    return text.encode("utf-8", "replace")[:REASON_BYTES].decode("utf-8", "ignore").encode()


def digest_keys(digests: NDArray[np.uint8]) -> NDArray[np.bytes_]:
    """Return digests (n, 16) as keys (n,) that can be sorted and compared."""
    # numpy ignores trailing zero bytes in comparisons; all keys have 16 bytes, so that does no harm
    return np.ascontiguousarray(digests).view(f"S{DIGEST_BYTES}").reshape(-1)


def fixed_text(values: Sequence[str], what: str) -> NDArray[np.bytes_]:
    """Return `values` as fixed-length UTF-8, shape (n,).

    Raises
    ------
    CacheError
        A value has a zero byte or is not valid Unicode; `what` names it.
    """
    found = [_encoded(values[start : start + _CHUNK], what) for start in range(0, len(values), _CHUNK)]
    joined = np.concatenate(found) if found else np.empty(0, "S1")
    return joined.astype(f"S{text_width(joined.dtype.itemsize)}", copy=False)


def _encoded(values: Sequence[str], what: str) -> NDArray[np.bytes_]:
    try:
        encoded = [value.encode() for value in values]
    except UnicodeEncodeError as error:
        raise CacheError(f"a {what} cannot be written as UTF-8 ({error.reason}); rename it") from None
    if any(b"\0" in value for value in encoded):
        raise CacheError(f"a {what} has a zero byte; rename it")
    return np.array(encoded, f"S{max(1, max(map(len, encoded)))}")


def decoded_text(raw: NDArray[np.bytes_]) -> NDArray[np.str_]:
    """Decode what `fixed_text` encoded; damaged bytes are escaped."""
    if (np.ascontiguousarray(raw).view(np.uint8) < 0x80).all():
        return raw.astype(str)
    return np.char.decode(raw, "utf-8", "backslashreplace")
