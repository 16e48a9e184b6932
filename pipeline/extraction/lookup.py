"""What a cache folder already holds of a request: looked up before anything heavy is imported."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from features_cache import PENDING, CacheError, CacheFile, Catalog, DamagedCacheError, Rows, check_twins, same_rows
from pipeline.backbones.known import recall
from pipeline.images.sources.registry import ImageSource
from pipeline.spec import LayerSpec, Request, aliases_of, is_outdated


def rows_of(images: ImageSource) -> Rows:
    """Return the images of a source as columns of a cache file."""
    return images.items.rows


def files_of(images: ImageSource, folder: Path) -> list[CacheFile]:
    """Return the cache files in `folder` that hold images of this source.

    Raises as `check_twins`, and `DamagedCacheError` if a file does not say how its layers were extracted.
    """
    try:
        files = Catalog(folder).files
    except CacheError:  # nothing usable yet; a damaged file of the name that is needed is refused later
        return []
    found = [file for file in files if file.handles.get("location") == images.location]
    for file in found:
        check_specs(file)
    check_twins(found)
    return found


def check_specs(file: CacheFile) -> None:
    """Raise `DamagedCacheError` unless a file says how its layers were extracted."""
    try:
        for info in file.layers.values():
            LayerSpec.from_json(info.spec)
        if "backbone" not in file.handles:
            raise ValueError("the key 'backbone' is missing")
    except ValueError as error:
        raise DamagedCacheError(
            f"{file.path} does not say how its layers were extracted: {error}; delete it and extract again"
        ) from error


def find_answer(files: Sequence[CacheFile], request: Request) -> dict[str, CacheFile] | None:
    """Return the file that holds each layer of `request`, or None if any layer is in no file of the same request.

    Files record what aliases stood for when they were made, so no network is needed where it is known what weights the
    backbone's name stands for.
    """
    alike = _alike(files, request)
    found: dict[str, CacheFile] = {}
    for alias in request.layers:
        names = next((known for file in alike if (known := aliases_of(file.request).get(alias))), None)
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
    alike = sorted(_same_request(files, request), key=is_outdated)
    specs = [info.spec for file in alike for info in file.layers.values()]
    return specs[0]["precision"] if specs else None


def _alike(files: Sequence[CacheFile], request: Request) -> list[CacheFile]:
    """Return the files of the same request, apart from its layers, that the present network and decoding rules made.

    There are none if what is behind the backbone's name may have changed since it was last loaded.
    """
    known = recall(request.backbone, request.size)
    if known is None:
        return []
    return [
        file
        for file in _same_request(files, request)
        if not is_outdated(file)
        and (known.heads < 2 or aliases_of(file.request).get("logits") == ["logits"])  # else of the first head alone
        and all(
            info.spec["weights_digest"] == known.weights_digest
            and known.preprocessing.items() <= info.spec["preprocessing"].items()  # it may have white and a view, too
            for info in file.layers.values()
        )
    ]


def _same_request(files: Sequence[CacheFile], request: Request) -> list[CacheFile]:
    asked = request.to_json()
    del asked["layers"]
    return [
        file for file in files if asked.items() <= file.request.items() and file.request.get("white") == request.white
    ]


def find_holder(files: Sequence[CacheFile], spec: LayerSpec) -> CacheFile | None:
    """Return the file that was made for exactly these features, filled or not; else one with older decoding rules."""
    fingerprints = [spec.fingerprint, *older_fingerprints(spec)]
    holds = [(file, info.fingerprint) for file in files for info in file.layers.values()]
    return next((file for one in fingerprints for file, found in holds if found == one), None)


def older_fingerprints(spec: LayerSpec) -> list[str]:
    """Return the fingerprints of the same features under older decoding rules, the latest first."""
    return [replace(spec, decode=decode).fingerprint for decode in reversed(range(1, spec.decode))]


def is_complete(file: CacheFile, rows: Rows, classes: Sequence[str], asked: np.ndarray | None = None) -> bool:
    """Tell whether `file` has exactly these rows and none is pending, or none of `asked`, (n,) bool."""
    return same_rows(file, rows, classes) and not (file.pending if asked is None else file.pending & asked).any()


def has_other_bytes(file: CacheFile, digests: NDArray[np.uint8]) -> bool:
    """Tell whether any finished row is of other bytes than `digests`, (n, 16), says; zeros where one is not known."""
    rows = np.flatnonzero((file.states != PENDING) & (file.digests != digests).any(axis=1))
    return bool((file.digests[rows].any(axis=1) & digests[rows].any(axis=1)).any())


def weights_file_digest(backbone: str) -> str | None:
    """Return the blake2b-128 digest of the weights file in ``NAME@FILE``; None if there is no such file."""
    path = Path(backbone.partition("@")[2])
    if not path.is_file():
        return None
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
