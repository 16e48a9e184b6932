"""One door to every kind of image source: a folder, a file, a manifest, shards, or the word ``digits``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from features_cache.errors import nearest, nearest_beside
from pipeline.errors import SourceError
from pipeline.images.sources.digits import DIGITS, open_digits
from pipeline.images.sources.folder import FileReader, open_folder, suffix_of, walk
from pipeline.images.sources.items import FOREIGN_SUFFIXES, IMAGE_SUFFIXES, Entry, ImageSource, Item, build_source
from pipeline.images.sources.manifest import open_csv, open_parquet
from pipeline.images.sources.shards import SHARD_SUFFIX, open_shards

__all__ = ["ImageSource", "Item", "open_source"]

EXPECTED = "a folder of images or of .tar shards, an image, a .csv or .parquet manifest, a .tar shard, or 'digits'"


def open_source(path: str | Path) -> ImageSource:
    """List the images of a source.

    Parameters
    ----------
    path : str or Path
        A folder of class folders (optionally under split folders), a flat folder, one image, a ``.csv`` or
        ``.parquet`` manifest, a ``.tar`` shard or a folder of them, or the word ``digits`` (where no such path exists).

    Returns
    -------
    ImageSource
        Its items sorted by uri.

    Raises
    ------
    SourceError
        Nothing there, nothing in it, or something in it contradicts itself.
    """
    where = Path(path)
    try:
        exists = where.exists()
    except (OSError, ValueError) as error:  # a name too long, a NUL, no permission on the way
        raise SourceError(f"{str(path)!r}: expected {EXPECTED}: {error}") from None
    if exists:
        source = _open_existing(_canonical(where))
    elif str(path) == DIGITS:
        source = open_digits()
    else:
        raise SourceError(f"{path}: expected {EXPECTED}, found nothing there{_suggestion(where)}")
    if not source.items:
        found = "; ".join(["found none", *source.notes])
        raise SourceError(f"{path}: expected at least one image ({', '.join(sorted(IMAGE_SUFFIXES))}), {found}")
    return source


def _canonical(path: Path) -> Path:
    """Return the absolute path with its last name as the user wrote it, a link or not."""
    return path.resolve() if path.name in {"", ".."} else path.parent.resolve() / path.name


def _open_existing(path: Path) -> ImageSource:
    if path.is_dir():
        return _open_folder_or_shards(path)
    openers: dict[str, Callable[[Path], ImageSource]] = {
        ".csv": open_csv,
        ".parquet": open_parquet,
        SHARD_SUFFIX: lambda shard: open_shards(shard, [shard]),
        **dict.fromkeys(IMAGE_SUFFIXES, _open_image),
    }
    opener = openers.get(path.suffix.lower())
    if opener is None or not path.is_file():
        remedy = "; save it as .jpg or .png" if path.suffix.lower() in FOREIGN_SUFFIXES else ""
        raise SourceError(f"{path}: expected {EXPECTED}, found another kind of file{remedy}")
    return opener(path)


def _open_folder_or_shards(folder: Path) -> ImageSource:
    """Return the images in a folder; one without any may hold shards instead."""
    found = list(walk(folder, IMAGE_SUFFIXES | FOREIGN_SUFFIXES))
    endings = Counter(suffix_of(file.uri) for file in found)
    images = [file for file in found if suffix_of(file.uri) in IMAGE_SUFFIXES]
    shards = [] if images else sorted(walk(folder, frozenset({SHARD_SUFFIX})))
    source = open_shards(folder, [folder / shard.uri for shard in shards]) if shards else open_folder(folder, images)
    return replace(source, passed_over={name: count for name, count in endings.items() if name in FOREIGN_SUFFIXES})


def _open_image(path: Path) -> ImageSource:
    status = path.stat()
    entry = Entry(path.name, "", "", "", status.st_size, status.st_mtime_ns)
    return build_source(path.stem, path.as_posix(), [entry], FileReader(path.parent))


def _suggestion(missing: Path) -> str:
    return nearest_beside(missing) or nearest(missing.name, [DIGITS])
