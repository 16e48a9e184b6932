"""The cache files that a request needs: those that lack rows, opened for writing, and new ones for the rest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from features_cache import CacheFile, CacheWriter, LayerInfo, Rows, file_name, grow, open_cache, same_rows
from pipeline.arrays import BoolArray
from pipeline.errors import ModelFileError
from pipeline.extraction.extractor import FeatureExtractor
from pipeline.extraction.lookup import find_answer, find_holder, is_complete
from pipeline.images.sources.registry import ImageSource
from pipeline.spec import LayerSpec, Request, fingerprint_of


@dataclass(frozen=True, eq=False)
class Destination:
    """A cache folder, and the rows of a source that its files are to have.

    Parameters
    ----------
    images : ImageSource
    rows : Rows
        All images of the source.
    asked : (n,) bool
        Which rows are to be computed; the others stay as they are.
    folder : Path
    files : sequence of CacheFile
        Those in `folder` that hold images of this source.
    rehash : bool
        Read every image again, even if its file looks unchanged.
    """

    images: ImageSource
    rows: Rows
    asked: BoolArray
    folder: Path
    files: Sequence[CacheFile]
    rehash: bool

    def has_all_of(self, file: CacheFile) -> bool:
        """Tell whether nothing is left to do for `file`: it has exactly these rows, and none of `asked` is pending."""
        return not self.rehash and is_complete(file, self.rows, self.images.classes, self.asked)

    def find_complete(self, request: Request) -> dict[str, CacheFile] | None:
        """Return the file of each layer of `request`, or None if a layer has none or a file is not complete."""
        answer = None if self.rehash else find_answer(self.files, request)
        return answer if answer is not None and all(map(self.has_all_of, answer.values())) else None


def open_files(
    destination: Destination, extractor: FeatureExtractor, expect: Sequence[LayerSpec] | None
) -> Iterator[Path | CacheWriter]:
    """Yield the files that hold the layers of an extractor's requests: paths of complete ones, writers of the others.

    Parameters
    ----------
    destination : Destination
    extractor : FeatureExtractor
    expect : sequence of LayerSpec, optional
        See `check_expected`.
    """
    for request in extractor.requests:
        specs = {name: extractor.spec(name, request) for name in extractor.layers}
        check_expected(specs.values(), expect)
        holders = {name: find_holder(destination.files, spec) for name, spec in specs.items()}
        for file in dict.fromkeys(holder for holder in holders.values() if holder):
            yield file.path if destination.has_all_of(file) else _continue(file, destination, extractor)
        missing = {name: spec for name, spec in specs.items() if holders[name] is None}
        if missing:
            yield _create(missing, request, destination, extractor)


def _continue(file: CacheFile, destination: Destination, extractor: FeatureExtractor) -> CacheWriter:
    """Open a file that lacks rows, or that was made for other rows."""
    extractor.engine(tuple(file.layers))  # first, so that a network that cannot run leaves the file as it is
    if same_rows(file, destination.rows, destination.images.classes) and not destination.rehash:
        return CacheWriter.resume(file.path)
    old = list(file.layers.values()), file.handles, file.request
    return grow(file.path, destination.rows, destination.images.classes, *old, carry=not destination.rehash)


def _create(
    specs: dict[str, LayerSpec], request: Request, destination: Destination, extractor: FeatureExtractor
) -> CacheWriter:
    images, backbone = destination.images, extractor.backbone
    tapped = extractor.tapped(tuple(specs))
    layers = [
        LayerInfo(name, tapped.dims[name], spec.store, spec.to_json(), spec.fingerprint, tapped.shapes.get(name, ()))
        for name, spec in specs.items()
    ]
    key = fingerprint_of([images.location, *(layer.fingerprint for layer in layers)])
    path = destination.folder / file_name(images.name, backbone.handle, key)
    handles = {"source": images.name, "location": images.location, "backbone": backbone.handle, "pool": request.pool}
    if request.view is not None:
        handles["view"] = f"{request.augment} {request.view}"
    if path.exists():
        open_cache(path)  # a damaged file of this name raises its own error
    extractor.engine(tuple(specs))  # first, so that a network that cannot run leaves no empty file
    asked = request.to_json() | {"aliases": extractor.aliases}
    return CacheWriter.create(path, destination.rows, images.classes, layers, handles, asked)


def check_expected(specs: Iterable[LayerSpec], expect: Sequence[LayerSpec] | None) -> None:
    """Raise `ModelFileError` if features differ from the expected ones in anything but precision."""
    for found, wanted in zip(specs, expect or (), strict=False):
        if replace(found, precision=wanted.precision) != wanted:
            old, new = wanted.to_json(), found.to_json()
            changed = ", ".join(key for key in old | new if old.get(key) != new.get(key) and key != "precision")
            raise ModelFileError(
                f"the model was trained on other features of {wanted.backbone} {wanted.layer}: {changed} differ here; "
                "use the weights and versions it was trained with, or train it again"
            )
