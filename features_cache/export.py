"""Export finished rows to formats that other tools read."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features_cache.atomic import atomic_write
from features_cache.errors import CacheError, explained, nearest
from features_cache.layout import DONE
from features_cache.reader import CacheFile

COLUMNS = ("uri", "label", "split", "group", "digest")


def export_features(cache: CacheFile, layer: str, path: str | Path) -> list[Path]:
    """Write the finished rows of one layer; the suffix of `path` chooses the format.

    ``.npy`` holds the matrix, and ``NAME.npy.csv`` beside it describes its rows. ``.parquet`` has the same columns plus
    ``features``, a fixed-size list. ``.safetensors`` has ``features`` and ``labels`` (int64), with the text columns and
    class names as JSON in its metadata. `label` is a class name. Missing texts are empty. Activations that were kept
    whole have their shape, in ``.parquet`` as fixed-shape tensors.

    Parameters
    ----------
    cache : CacheFile
        The file to read.
    layer : str
        Name of one of its layers.
    path : str or Path
        The file to write; an existing one is replaced atomically.

    Returns
    -------
    list of Path
        What was written.

    Raises
    ------
    CacheError
        The layer or format is unknown, no row is finished, the format cannot hold so many rows, a library is missing,
        or the folder cannot be written.
    DamagedCacheError
        Some of the rows do not match their checksums.
    """
    path = Path(path)
    writers: dict[str, Callable[[Path, NDArray[Any], dict[str, list[str]], CacheFile, NDArray[np.int64]], None]] = {
        ".npy": _npy,
        ".parquet": _parquet,
        ".safetensors": _safetensors,
    }
    if path.suffix not in writers:
        known = nearest(path.suffix, writers)
        raise CacheError(f"cannot export to {path}: expected one of {', '.join(writers)}, not {path.suffix!r}{known}")
    cache.layer(layer)
    cache.check_columns()
    rows = np.flatnonzero(cache.states == DONE)
    if not len(rows):
        raise CacheError(f"{cache.path} has no finished row to export; run the extraction first")
    features = cache.features(layer, slice(None) if len(rows) == cache.n_rows else rows)
    features = features.reshape(len(rows), *(cache.layer(layer).shape or (-1,)))
    columns = _columns(cache, rows)
    written = [path]
    if path.suffix == ".npy":
        beside = path.with_name(f"{path.name}.csv")
        written.append(beside)
        with explained(beside, "write"), atomic_write(beside) as draft:
            _csv(draft, columns)
    with explained(path, "write"), atomic_write(path) as draft:
        writers[path.suffix](draft, features, columns, cache, rows)
    return written


def _columns(cache: CacheFile, rows: NDArray[np.int64]) -> dict[str, list[str]]:
    return {
        "uri": cache.uris[rows].tolist(),
        "label": [cache.classes[label] if label >= 0 else "" for label in cache.labels[rows].tolist()],
        "split": cache.splits[rows].tolist(),
        "group": cache.groups[rows].tolist(),
        "digest": [digest.tobytes().hex() for digest in cache.digests[rows]],
    }


def _csv(path: Path, columns: dict[str, list[str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(zip(*(columns[name] for name in COLUMNS), strict=True))


def _npy(path: Path, features: NDArray[Any], *_: object) -> None:
    with path.open("wb") as file:
        np.save(file, features)


def _parquet(path: Path, features: NDArray[Any], columns: dict[str, list[str]], *_: object) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise CacheError("export to .parquet needs pyarrow; install it with: pip install 'thawline[parquet]'") from None
    arrays: dict[str, Any] = {name: pa.array(columns[name], pa.string()) for name in COLUMNS}
    rows = np.ascontiguousarray(features)
    flat = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows[0].size)
    if rows.ndim > 2:
        flat = pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(flat.type.value_type, rows.shape[1:]), flat)
    arrays["features"] = flat
    pq.write_table(pa.table(arrays), path)


def _safetensors(
    path: Path, features: NDArray[Any], columns: dict[str, list[str]], cache: CacheFile, rows: NDArray[np.int64]
) -> None:
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import save_file
    except ImportError:
        raise CacheError("export to .safetensors needs safetensors; install it with: pip install safetensors") from None
    tensors = {"features": np.ascontiguousarray(features), "labels": np.ascontiguousarray(cache.labels[rows])}
    texts = {**columns, "classes": list(cache.classes)}
    try:
        save_file(tensors, path, metadata={name: json.dumps(values) for name, values in texts.items()})
    except SafetensorError as error:
        raise CacheError(
            f"cannot export to .safetensors: {error}; .npy and .parquet take any number of rows"
        ) from error
