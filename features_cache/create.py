"""Create a cache file: HDF5 writes the structure once; later writes are raw bytes at known offsets."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from features_cache.checksums import source_crc
from features_cache.convert import fixed_text
from features_cache.errors import CacheError, explained
from features_cache.header import LINE_BYTES, header_line, is_name, structure_digest
from features_cache.layout import (
    DTYPES,
    MAGIC,
    SPLITS,
    VERSION,
    ArrayInfo,
    FileLayout,
    LayerInfo,
    Rows,
    lay_out_arrays,
)
from features_cache.rowfile import RowFile, open_own

_ATTRIBUTE_LIMIT = 60_000  # attributes of the oldest, most portable HDF5 format must stay below 64 KiB


def build_file(
    path: Path,
    rows: Rows,
    classes: Sequence[str],
    layers: Sequence[LayerInfo],
    handles: Mapping[str, str],
    request: Mapping[str, Any],
) -> None:
    """Write a complete, synced cache file with all rows pending and all disk space reserved; replaces `path`.

    Raises
    ------
    CacheError
        Rows or layers are inconsistent, the disk is too small, or the folder cannot be written.
    """
    columns = _columns(rows, classes)
    _check(rows, classes, layers, handles)
    widths = {name: columns[name].dtype.itemsize for name in ("classes", "uri", "group")}
    layout = lay_out_arrays(len(rows), len(classes), widths, layers)
    _check_space(path, sum(ArrayInfo(0, *place).nbytes for place in layout.values()))
    table: dict[str, Any] = {
        "id": uuid.uuid4().hex,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": len(rows),
        "handles": dict(handles),
        "request": dict(request),
        "layers": [layer.to_json() for layer in layers],
    }
    block = _power_of_two(
        LINE_BYTES + len(_encode(table, {name: ArrayInfo(1 << 60, *layout[name]) for name in layout}))
    )
    with explained(path, "write"):
        path.unlink(missing_ok=True)  # HDF5 would write through a link of this name
        os.close(open_own(path, os.O_WRONLY | os.O_EXCL))
    try:
        arrays = _lay_out(path, layout, layers, table, block)
        with explained(path, "write"), RowFile(path) as file:
            _reserve(file, max(array.end for array in arrays.values()))
            for name, column in columns.items():
                file.write(arrays["/classes" if name == "classes" else f"/rows/{name}"].offset, column)
            _write_user_block(file.descriptor, arrays, _encode(table, arrays))
            os.fsync(file.descriptor)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _columns(rows: Rows, classes: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Return the arrays that are written when the file is created, as stored."""
    columns: dict[str, NDArray[Any]] = {
        "classes": fixed_text(classes, "class name"),
        "label": np.asarray(rows.labels, "<i8"),
        "size": np.asarray(rows.sizes, "<i8"),
        "mtime_ns": np.asarray(rows.mtimes_ns, "<i8"),
        "uri": fixed_text(rows.uris, "uri"),
        "group": fixed_text(rows.groups, "group"),
        "split": fixed_text(rows.splits, "split"),
        "run": np.full(len(rows), -1, "<i4"),
    }
    if {len(column) for name, column in columns.items() if name != "classes"} != {len(rows)}:
        raise CacheError(f"every column must have {len(rows)} entries, one per uri; some have another length")
    columns["source_crc"] = source_crc(columns["label"], columns["split"], columns["group"], columns["uri"])
    return columns


def _check(rows: Rows, classes: Sequence[str], layers: Sequence[LayerInfo], handles: Mapping[str, str]) -> None:
    if not len(rows):
        raise CacheError("the source has no images; a cache needs at least one")
    if not layers:
        raise CacheError("no layer was given; a cache needs at least one")
    if strange := set(rows.splits) - set(SPLITS):
        raise CacheError(f"unknown split {sorted(strange)[0]!r}; expected train, val, test or none")
    labels = np.asarray(rows.labels)
    if labels.min() < -1 or labels.max() >= len(classes):
        raise CacheError(f"labels must lie between -1 and {len(classes) - 1}; some do not")
    if len({layer.name for layer in layers}) != len(layers):
        raise CacheError("two layers have the same name; request each layer once")
    for layer in layers:
        if not is_name(layer.name) or layer.name in ("", ".", "..") or "/" in layer.name:
            raise CacheError(f"{layer.name!r} cannot name a layer; expected a dotted module name")
        if layer.dtype not in DTYPES or layer.dim < 1:
            raise CacheError(
                f"layer {layer.name}: expected float32 or float16 and a length of 1 or more, "
                f"not {layer.dtype} and {layer.dim}"
            )
    for value in (*handles.values(), *(layer.fingerprint for layer in layers)):
        if not is_name(value):
            raise CacheError(
                f"{value!r} cannot name a cache: it has control characters or is not valid Unicode; rename the source"
            )


def _lay_out(
    path: Path, layout: FileLayout, layers: Sequence[LayerInfo], table: Mapping[str, Any], block: int
) -> dict[str, ArrayInfo]:
    """Let HDF5 write the structure, with all of its metadata in one leading block."""
    meta_block = 1 << 16
    while True:
        try:
            arrays = _structure(path, layout, layers, table, block, meta_block)
        except (OSError, RuntimeError) as error:
            code = re.search(r"errno = (\d+)", str(error))
            with explained(path, "write"):
                raise (OSError(int(code[1]), os.strerror(int(code[1]))) if code else OSError(str(error))) from error
        places = sorted((array.offset, array.end) for array in arrays.values() if array.nbytes)
        if all(end == start for (_, end), (start, _) in pairwise(places)):
            return arrays
        meta_block *= 2


def _structure(
    path: Path, layout: FileLayout, layers: Sequence[LayerInfo], table: Mapping[str, Any], block: int, meta_block: int
) -> dict[str, ArrayInfo]:
    create = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    create.set_layout(h5py.h5d.CONTIGUOUS)
    create.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    create.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    create.set_obj_track_times(False)
    arrays = {}
    options = {"libver": ("earliest", "v110"), "userblock_size": block, "meta_block_size": meta_block}
    with h5py.File(path, "w", locking=False, **options) as file:
        for group in ("rows", "crc", "features"):
            file.create_group(group)
        for name, (dtype, shape) in layout.items():
            kind = np.dtype(dtype)
            stored = h5py.string_dtype("utf-8", kind.itemsize) if kind.kind == "S" else kind
            space = h5py.h5s.create_simple(shape)
            dataset = h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(stored, logical=True), space, create)
            offset = dataset.get_offset() if 0 not in shape else block
            arrays[name] = ArrayInfo(offset, dtype, shape)
        for layer in layers:
            attributes = file["features"][layer.name].attrs
            _annotate(attributes, "fingerprint", layer.fingerprint)
            _annotate(attributes, "spec", json.dumps(dict(layer.spec)))
        for key in ("id", "created"):
            _annotate(file.attrs, key, table[key])
        for key in ("handles", "request"):
            _annotate(file.attrs, key, json.dumps(table[key]))
        _annotate(file.attrs, "format", f"{MAGIC.decode()} {VERSION}")
    return arrays


def _annotate(attributes: Any, key: str, text: str) -> None:
    encoded = text.encode()
    if len(encoded) > _ATTRIBUTE_LIMIT:
        raise CacheError(
            f"{key} has {len(encoded)} bytes, at most {_ATTRIBUTE_LIMIT} fit; request fewer layers at once"
        )
    attributes.create(key, encoded, dtype=h5py.string_dtype("utf-8", max(1, len(encoded))))


def _encode(table: Mapping[str, Any], arrays: Mapping[str, ArrayInfo]) -> bytes:
    places = {name: {"offset": x.offset, "dtype": x.dtype, "shape": list(x.shape)} for name, x in arrays.items()}
    return json.dumps({**table, "arrays": places}).encode()


def _power_of_two(least: int) -> int:
    return max(512, 1 << (least - 1).bit_length())


def _check_space(path: Path, size: int) -> None:
    """Refuse a file that does not fit on the disk, before anything is written."""
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise CacheError(
            f"cannot write {path}: it needs {size / 1e9:.3g} GB and {free / 1e9:.3g} GB are free; "
            "free some space, choose another folder, request fewer layers, or store float16"
        )


def _reserve(file: RowFile, size: int) -> None:
    """Reserve `size` bytes on disk now, so that a full disk shows before hours of work."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.descriptor, 0, size)
    else:
        os.ftruncate(file.descriptor, size)


def _write_user_block(descriptor: int, arrays: Mapping[str, ArrayInfo], table: bytes) -> None:
    """Write the first line and the table; the digest covers everything before the first array that may change."""
    checked = arrays["/runs"].offset
    size = max(array.end for array in arrays.values())
    line = header_line(len(table), checked, size, "0" * 32)
    os.pwrite(descriptor, line + table, 0)
    head = os.pread(descriptor, checked, 0)
    digest = structure_digest(line, head[len(line) :])
    os.pwrite(descriptor, header_line(len(table), checked, size, digest), 0)
