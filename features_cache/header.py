"""Read and check the user block, in plain Python, before libhdf5 opens the file.

The first line is ``thawline-cache VERSION TABLE CHECKED FILE DIGEST``; behind it stand TABLE bytes of JSON. DIGEST
covers the first CHECKED bytes without itself: the JSON, the HDF5 structure, the class names. None of these change after
the file is created, so one damaged bit is found before any offset is used.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from features_cache.convert import parse_json
from features_cache.errors import CacheError, DamagedCacheError, explained
from features_cache.layout import DTYPES, MAGIC, VERSION, ArrayInfo, LayerInfo, lay_out_arrays

_LINE = re.compile(rb"thawline-cache (\d{1,9}) (\d{1,9}) (\d{1,9}) (\d{1,18}) ([0-9a-f]{32})\n")
_HDF5 = b"\x89HDF\r\n\x1a\n"
LINE_BYTES = 128
_LIMIT = 1 << 28  # far above any real structure; a forged size must not cost minutes of hashing


@dataclass(frozen=True)
class Header:
    """The checked user block of one file.

    Parameters
    ----------
    line : bytes
        The first line. It differs between any two files, so it identifies the file.
    file_bytes : int
        Required size of the file.
    n_rows : int
        Count of images.
    classes : tuple of str
        Class names.
    layers : dict of str to LayerInfo
        In creation order.
    handles, request : dict
        How users select the file, and the request it was made for; opaque here.
    created : str
        Time of creation, ISO 8601.
    arrays : dict of str to ArrayInfo
        Where everything lies.
    """

    line: bytes
    file_bytes: int
    n_rows: int
    classes: tuple[str, ...]
    layers: dict[str, LayerInfo]
    handles: dict[str, str]
    request: dict[str, Any]
    created: str
    arrays: dict[str, ArrayInfo]


def header_line(table: int, checked: int, file_bytes: int, digest: str) -> bytes:
    """Return the first line of the user block."""
    return MAGIC + f" {VERSION} {table} {checked} {file_bytes} {digest}\n".encode()


def structure_digest(line: bytes, rest: bytes) -> str:
    """Return the blake2b-128 hex digest of the first line up to its digest and of `rest`, the bytes after it."""
    return hashlib.blake2b(line[: line.rindex(b" ") + 1] + rest, digest_size=16).hexdigest()


def read_line(path: Path) -> bytes:
    """Return the first line of a file, `LINE_BYTES` at most; the file need not be a cache."""
    with path.open("rb") as file:
        return file.readline(LINE_BYTES)


def read_header(path: Path) -> Header:
    """Read and check the user block of a cache file.

    Raises
    ------
    CacheError
        The file does not exist or cannot be read.
    DamagedCacheError
        It is not a cache, has another version, was cut short, or its structure is damaged.
    """
    with explained(path, "open"):
        if not stat.S_ISREG(path.stat().st_mode):
            raise CacheError(f"cannot open {path}: expected a cache file, but this is not a regular file")
        with path.open("rb") as file:
            line = file.readline(LINE_BYTES)
            table_bytes, checked, file_bytes, digest = _parse_line(path, line)
            size = os.fstat(file.fileno()).st_size
            if size != file_bytes:
                raise _refused(path, f"it should have {file_bytes} bytes but has {size} (cut short or extended)")
            head = line + file.read(checked - len(line))
    if structure_digest(line, head[len(line) :]) != digest:
        raise _refused(path, "its structure does not match its own digest")
    try:
        return _interpret(line, head, table_bytes, file_bytes)
    except (ValueError, TypeError, LookupError, OverflowError) as error:
        raise _refused(path, f"its table contradicts the format ({_one_line(error)})") from error


def _refused(path: Path, reason: str) -> DamagedCacheError:
    return DamagedCacheError(
        f"{path} is not usable as a cache: {reason}; restore it from a copy, or delete it and extract again"
    )


def _one_line(error: Exception) -> str:
    return " ".join(ascii(str(error))[1:-1].split())[:120]


def _parse_line(path: Path, line: bytes) -> tuple[int, int, int, str]:
    match = _LINE.fullmatch(line)
    if match is None:
        if line.startswith(MAGIC + b" "):
            raise _refused(path, "its first line is damaged")
        kind = "an HDF5 file of something else" if line.startswith(_HDF5[:5]) else "not a feature cache"
        raise DamagedCacheError(f"{path} is {kind}; expected a file made by extraction")
    version, table_bytes, checked, file_bytes = map(int, match.groups()[:4])
    if version != VERSION:
        raise DamagedCacheError(
            f"{path} has format version {version}, this release reads version {VERSION}; "
            "use the release that made it, or delete it and extract again"
        )
    if not len(line) + table_bytes <= checked <= min(file_bytes, _LIMIT):
        raise _refused(path, "the sizes in its first line contradict each other")
    return table_bytes, checked, file_bytes, match.group(5).decode()


def _interpret(line: bytes, head: bytes, table_bytes: int, file_bytes: int) -> Header:
    """Build the header from bytes with a correct digest; they may still be forged, so every value is checked."""
    table = parse_json(head[len(line) : len(line) + table_bytes])
    layers = [layer_of(entry) for entry in _typed(table, "layers", list)]
    arrays = {str(name): _array(entry) for name, entry in _typed(table, "arrays", dict).items()}
    n_rows = _count(table["rows"], 1)
    classes = arrays["/classes"]
    widths = {key: _width(arrays[name]) for key, name in _TEXTS.items()}
    layout = lay_out_arrays(n_rows, _count(classes.shape[0], 0), widths, layers)
    if not layers or len({layer.name for layer in layers}) != len(layers):
        raise ValueError("no layers, or two of one name")
    if {name: (array.dtype, array.shape) for name, array in arrays.items()} != layout:
        raise ValueError("names, types or shapes of the arrays are wrong")
    _check_places(arrays, len(head), file_bytes)
    handles = {str(key): _name(value) for key, value in _typed(table, "handles", dict).items()}
    width = widths["classes"]
    names = head[classes.offset : classes.end]
    return Header(
        line=line,
        file_bytes=file_bytes,
        n_rows=n_rows,
        classes=tuple(names[start : start + width].rstrip(b"\0").decode() for start in range(0, classes.nbytes, width)),
        layers={layer.name: layer for layer in layers},
        handles=handles,
        request=_typed(table, "request", dict),
        created=_name(table["created"]),
        arrays=arrays,
    )


_TEXTS = {"classes": "/classes", "uri": "/rows/uri", "group": "/rows/group"}


def _check_places(arrays: Mapping[str, ArrayInfo], checked: int, file_bytes: int) -> None:
    """Check that class names lie inside the checked part, other arrays behind it, and that nothing overlaps."""
    end = 0
    for name, array in sorted(arrays.items(), key=lambda item: item[1].offset):
        if name == "/classes":
            if array.end > checked:
                raise ValueError("class names outside the checked part")
        elif array.offset < max(end, checked) or array.end > file_bytes:
            raise ValueError(f"array {name} overlaps another part or leaves the file")
        elif not array.dtype.startswith("|") and array.offset % np.dtype(array.dtype).itemsize:
            raise ValueError(f"array {name} is not aligned")
        else:
            end = array.end


def layer_of(entry: dict[str, Any]) -> LayerInfo:
    """Return the layer that an entry of a table describes; raises what a wrong entry leads to."""
    layer = LayerInfo(
        name=_name(entry["name"]),
        dim=_count(entry["dim"], 1),
        dtype=_name(entry["dtype"]),
        spec=_typed(entry, "spec", dict),
        fingerprint=_name(entry["fingerprint"]),
        shape=tuple(_count(size, 1) for size in entry.get("shape", ())),
    )
    if layer.dtype not in DTYPES or "/" in layer.name or math.prod(layer.shape or (layer.dim,)) != layer.dim:
        raise ValueError(f"layer {layer.name} of type {layer.dtype}")
    return layer


def _array(entry: dict[str, Any]) -> ArrayInfo:
    shape = tuple(_count(size, 0) for size in _typed(entry, "shape", list))
    return ArrayInfo(_count(entry["offset"], 0), _name(entry["dtype"]), shape)


def _width(array: ArrayInfo) -> int:
    match = re.fullmatch(r"\|S(\d{1,6})", array.dtype)
    if match is None or int(match[1]) < 1:
        raise ValueError("a text array is not of fixed length")
    return int(match[1])


def _count(value: Any, least: int) -> int:
    if type(value) is not int or not least <= value < 1 << 56:
        raise ValueError("a count or offset is not a whole number in range")
    return value


def _name(value: Any) -> str:
    if not is_name(value):
        raise ValueError("a name is not text or has control characters")
    return str(value)


def is_name(value: Any) -> bool:
    """Return whether `value` is one line of valid Unicode text without control characters."""
    return isinstance(value, str) and re.search(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", value) is None


def _typed(table: Mapping[str, Any], key: str, kind: type) -> Any:
    if not isinstance(table[key], kind):
        raise TypeError(f"{key} is not a {kind.__name__}")
    return table[key]
