"""All kinds of image sources: folders, images, manifests, packed files, URLs of these, or a word such as ``digits``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from features_cache import UriRange, nearest, nearest_beside
from pipeline.errors import SourceError
from pipeline.images.sources.digits import open_digits
from pipeline.images.sources.folder import open_folder, open_image
from pipeline.images.sources.items import FOREIGN_EXTENSIONS, IMAGE_EXTENSIONS, ImageSource, Item, Items, Location
from pipeline.images.sources.manifest import open_manifest
from pipeline.images.sources.packed import open_packed
from pipeline.images.sources.remote import RemotePath, is_url, locate

__all__ = ["ImageSource", "Item", "Items", "open_source"]

_PATHS: dict[str, Callable[[Any], ImageSource | None]] = {
    "a folder of images": open_folder,
    "an image": open_image,
    "a .tar, .tar.gz, .zip, .parquet or .arrow file or a folder of them": open_packed,
    "a .csv, .tsv, .jsonl or .parquet manifest": open_manifest,
}
"""What a path or URL may lead to. An opener returns None for another kind; the first to find an image decides."""

_WORDS: dict[str, Callable[[], ImageSource]] = {"digits": open_digits}
"""Sources that have a name instead of a path."""

_EXPECTED = f"{', '.join(_PATHS)}, or {', '.join(map(repr, _WORDS))}"


def open_source(path: str | Path | ImageSource, within: UriRange | None = None) -> ImageSource:
    """List the images of a source; a source that was listed already is returned as it is.

    Parameters
    ----------
    path : str, Path or ImageSource
        A folder of class folders (optionally under split folders), a flat folder, one image; a manifest (``.csv``,
        ``.tsv``, ``.jsonl`` or ``.parquet``); a file with images inside (``.tar``, ``.tar.gz``, ``.zip``, ``.parquet``
        or ``.arrow``) or a folder of them; all of these behind a URL that fsspec opens; or the word ``digits`` (if no
        such path exists).
    within : UriRange, optional
        The uris that are needed: packed files without any of them are not opened. What was listed, which may be more,
        is in the source's `within`.

    Returns
    -------
    ImageSource
        Its items are sorted by uri.

    Raises
    ------
    SourceError
        There is nothing at `path`, no image in it, or something in it contradicts itself.

    Examples
    --------
    >>> source = open_source("digits")
    >>> len(source.items), source.classes[:3]
    (1797, ('0', '1', '2'))
    >>> source.items[0].uri
    'digits/0000'
    """
    if isinstance(path, ImageSource):
        return path
    if is_url(str(path)):
        where = locate(str(path))
        if isinstance(where, RemotePath):
            return _open_path(where, within)
        path = where
    where = Path(path)
    try:
        exists = where.exists()
    except (OSError, ValueError) as error:  # a name too long, a NUL, no permission on the way
        raise SourceError(f"{str(path)!r}: expected {_EXPECTED}: {error}") from None
    if exists:
        return _open_path(_absolute(where), within)
    if str(path) in _WORDS:
        return _WORDS[str(path)]()
    suggestion = nearest_beside(where) or nearest(where.name, _WORDS)
    raise SourceError(f"{path}: expected {_EXPECTED}, found nothing there{suggestion}")


def _absolute(path: Path) -> Path:
    """Return the absolute path; its last name stays as the user wrote it, even if it is a link."""
    return path.resolve() if path.name in {"", ".."} else path.parent.resolve() / path.name


def _open_path(path: Location, within: UriRange | None) -> ImageSource:
    notes: list[str] | None = None
    for opener in _PATHS.values():
        source = open_packed(path, within) if opener is open_packed else opener(path)
        if source is not None and (source.items or source.within is not None):
            return source
        if source is not None:
            notes = notes or source.notes
    if notes is None:
        if isinstance(path, RemotePath) and not path.is_file():
            raise SourceError(f"{path}: expected {_EXPECTED}, found nothing there")
        remedy = "; save it as .jpg or .png" if path.suffix.lower() in FOREIGN_EXTENSIONS else ""
        raise SourceError(f"{path}: expected {_EXPECTED}, found another kind of file{remedy}")
    found = "; ".join(["found none", *notes])
    raise SourceError(f"{path}: expected at least one image ({', '.join(sorted(IMAGE_EXTENSIONS))}), {found}")
