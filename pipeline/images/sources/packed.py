"""Files that hold many images: tar shards, zip archives and tables, alone or in folders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise

from features_cache import UriRange
from pipeline.errors import SourceError
from pipeline.images.sources.folder import unnoticed, walk
from pipeline.images.sources.items import ImageSource, Item, Location, Packed, build_source, extension_of
from pipeline.images.sources.remote import RemotePath, hold_if_small
from pipeline.images.sources.shards import read_shards
from pipeline.images.sources.tables import holds_images, read_arrow, read_parquet
from pipeline.images.sources.zips import read_zips

_READERS: dict[tuple[str, ...], Callable[[Mapping[str, Location], Packed], Iterator[tuple[Item, str]]]] = {
    (".tar", ".tar.gz", ".tgz"): read_shards,
    (".zip",): read_zips,
    (".parquet",): read_parquet,
    (".arrow",): read_arrow,
}
"""What lists the images in files, by the endings of their names, and adds readers and remarks to a `Packed`.

In a folder, files of the first kind that is there are read.
"""

_READ_WHOLE = (read_shards, read_arrow)
"""Only the whole of such a file tells where its images are, so remote ones are kept in memory if they are small."""


def open_packed(path: Location, within: UriRange | None = None) -> ImageSource | None:
    """Return the images in a packed file, or in all files of one kind under a folder; None if there is none.

    Files that hold no image `within` a range of uris are not opened.

    Uris are ``file/member``, with the file's path relative to the folder. Where members have no split, it is the one
    split word in the file's path (``train-000.tar``, ``set-validation-01.zip``, ``test/7.parquet``); there is none if
    the path has no such word, or two. All images of a file change when the file does.

    Raises
    ------
    SourceError
        A file is damaged, or contradicts itself, or is beside a folder of its name.
    """
    others: Counter[str] = Counter()
    if (named := _files(path, others)) is None:
        return None
    name, files = named
    kind = next((kind for kind in _READERS if any(uri.lower().endswith(kind) for uri in files)), ())
    chosen = {uri: file for uri, file in files.items() if uri.lower().endswith(kind)}
    others.update(extension_of(uri) for uri in files.keys() - chosen.keys())
    for uri, other in pairwise(sorted(f"{uri}/" for uri in chosen)):
        if other.startswith(uri):
            raise SourceError(f"{path}: expected a file or a folder, found {uri[:-1]} to be both: rename the file")
    chosen = {uri: file.ask_size() if isinstance(file, RemotePath) else file for uri, file in chosen.items()}
    if _READERS.get(kind) in _READ_WHOLE:
        hold_if_small(chosen.values())
    if within is not None:
        chosen, within = _within(chosen, within)
    packed = Packed()
    labelled = _READERS[kind](chosen, packed) if chosen else ()
    source = build_source(name, path.as_posix(), labelled, packed.read)
    packed.uris = source.items.rows.uris
    is_web = isinstance(path, RemotePath) and path.is_http
    return replace(
        source,
        passed_over=packed.passed_over + others,
        remarks=(*source.remarks, *packed.remarks, *unnoticed(source.items if is_web else ())),
        remote=isinstance(path, RemotePath),
        within=within,
    )


def _files(path: Location, others: Counter[str]) -> tuple[str, dict[str, Location]] | None:
    """Return the name of a source and its packed files, by their paths relative to it; None if `path` is none.

    The extensions of other files are counted in `others`.
    """
    endings = tuple(ending for kind in _READERS for ending in kind)
    if path.is_dir():
        found = sorted(item.uri for item in walk(path, lambda file, _: file.name.lower().endswith(endings), others))
        below = path.files if isinstance(path, RemotePath) else None
        return path.name or "root", {uri: path / uri if below is None else below[uri] for uri in found}
    ending = next((ending for ending in endings if path.name.lower().endswith(ending)), "")
    if not ending or not path.is_file() or (ending == ".parquet" and not holds_images(path)):
        return None
    return path.name[: -len(ending)], {path.name: path}


def _within(files: Mapping[str, Location], wanted: UriRange) -> tuple[dict[str, Location], UriRange | None]:
    """Return the files that may hold images in a range of uris, and the range that they cover; None if they are all."""
    first, end = wanted
    chosen = {}
    for uri, file in files.items():
        start, stop = f"{uri}/", f"{uri}0"  # 0 is the character after /
        if UriRange(start, stop).overlaps(wanted):
            chosen[uri] = file
            first, end = min(first, start), None if end is None else max(end, stop)
    return chosen, None if len(chosen) == len(files) else UriRange(first, end)
