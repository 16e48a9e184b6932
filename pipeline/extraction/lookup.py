"""What a cache folder already holds of a request: looked up before anything heavy is imported."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from features_cache import CacheError, CacheFile, Catalog, Rows, same_rows
from pipeline.backbones.known import recall
from pipeline.images.sources.registry import ImageSource
from pipeline.spec import DECODE_POLICY, LayerSpec, Request


def rows_of(images: ImageSource) -> Rows:
    """Return the images of a source as columns of a cache file."""
    items = images.items
    return Rows(
        uris=[item.uri for item in items],
        labels=np.array([item.label for item in items], np.int64),
        splits=[item.split for item in items],
        groups=[item.group for item in items],
        sizes=np.array([item.size for item in items], np.int64),
        mtimes_ns=np.array([item.mtime_ns for item in items], np.int64),
    )


def files_of(images: ImageSource, folder: Path) -> list[CacheFile]:
    """Return the cache files in `folder` that hold images of this source."""
    try:
        files = Catalog(folder).files
    except CacheError:  # nothing usable yet; a damaged file of the name that is needed is refused later
        return []
    return [file for file in files if file.handles.get("location") == images.location]


def find_answer(files: Sequence[CacheFile], request: Request) -> dict[str, CacheFile] | None:
    """Return the file that holds each layer of `request`, or None if any layer is in no file of the same request.

    Files record what aliases stood for when they were made, so no network is needed where it is known what weights the
    backbone's name stands for.
    """
    alike = _alike(files, request)
    found: dict[str, CacheFile] = {}
    for alias in request.layers:
        names = next((file.request["aliases"][alias] for file in alike if alias in file.request["aliases"]), None)
        if names is None:
            return None
        for name in names:
            holder = next((file for file in alike if name in file.layers), None)
            if holder is None:
                return None
            found[name] = holder
    return found


def begun_precision(files: Sequence[CacheFile], request: Request) -> str | None:
    """Return the precision of a file of the same request, with which ``auto`` continues."""
    specs = [info.spec for file in _alike(files, request) for info in file.layers.values()]
    return specs[0]["precision"] if specs else None


def _alike(files: Sequence[CacheFile], request: Request) -> list[CacheFile]:
    """Return the files of the same request, apart from its layers, made with the present weights and decoding rules.

    There are none if the weights behind the backbone's name may have changed since they were last loaded.
    """
    asked, known = request.to_json(), recall(request.backbone, request.size)
    del asked["layers"]
    if known is None:
        return []
    present = {"decode": DECODE_POLICY, "weights_digest": known.weights_digest}
    return [
        file
        for file in files
        if asked.items() <= file.request.items()
        and (known.heads < 2 or file.request["aliases"].get("logits") == ["logits"])  # else the first head's alone
        and all(present.items() <= info.spec.items() for info in file.layers.values())
    ]


def find_holder(files: Sequence[CacheFile], spec: LayerSpec) -> CacheFile | None:
    """Return the file that was made for exactly these features, filled or not."""
    return next((file for file in files for info in file.layers.values() if info.fingerprint == spec.fingerprint), None)


def is_complete(file: CacheFile, rows: Rows, classes: Sequence[str], asked: np.ndarray | None = None) -> bool:
    """Tell whether `file` has exactly these rows and none is pending, or none of `asked`, (n,) bool."""
    return same_rows(file, rows, classes) and not (file.pending if asked is None else file.pending & asked).any()


def weights_file_digest(backbone: str) -> str | None:
    """Return the blake2b-128 digest of the weights file in ``NAME@FILE``; None if there is no such file."""
    path = Path(backbone.partition("@")[2])
    if not path.is_file():
        return None
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
