"""``.tar`` shards in WebDataset form, plain or compressed by gzip: images and the members that hold their labels."""

from __future__ import annotations

import json
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from io import DEFAULT_BUFFER_SIZE, BufferedReader, BytesIO, FileIO, RawIOBase
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from pipeline.errors import SourceError
from pipeline.images.ahead import map_ahead
from pipeline.images.sources.gzipped import Gzipped
from pipeline.images.sources.items import (
    IMAGE_EXTENSIONS,
    OTHER_EXTENSIONS,
    Item,
    Location,
    Packed,
    check_size,
    check_unchanged,
    extension_of,
    holds_image,
    plain_name,
    read_part,
    split_in,
    stamp,
    unreadable,
)
from pipeline.images.sources.remote import LISTED_AT_ONCE, RemotePath, Stamp, hold_if_small
from pipeline.tables import text_of

GZIPPED = (".tar.gz", ".tgz")

LABEL_LIMIT = 1 << 20
"""Most bytes of a ``.cls`` or ``.json`` member that holds a label."""


READ_LIMIT = 1 << 26
"""Most bytes that are read at once from a shard while it is listed: a forged header may ask for any number."""

FETCHED_AT_ONCE = 1 << 24
"""Bytes of a remote shard that are fetched at once while it is listed."""

FETCHED_PACKED = 1 << 21
"""Bytes of a remote gzipped shard that are fetched at once: to list it, and to unpack a block."""


class _BoundedReader(BufferedReader):
    """A file that raises `tarfile.ReadError` where more than `READ_LIMIT` bytes are asked for at once."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > READ_LIMIT:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


class _Shard(NamedTuple):
    """What a shard holds.

    Attributes
    ----------
    images : dict of str to callable
        Reads each image, by the name of its member. If several have the same name, the last one counts.
    sizes : dict of str to int
        Bytes of each image.
    labels : dict of str to str
        By the name of the member without its extension.
    others : Counter
        How many other members there are, by their extensions.
    """

    images: dict[str, Callable[[], bytes]]
    sizes: dict[str, int]
    labels: dict[str, str]
    others: Counter[str]


def read_shards(files: Mapping[str, Location]) -> Packed:
    """Return the images in shards.

    The label is the text of the ``.cls`` member that belongs to the image (see `_label_of`), else ``"label"`` in the
    ``.json`` member. Links, hidden members and members whose name leads out of the shard are ignored.

    Raises
    ------
    SourceError
        A shard is damaged, a label is neither text nor a number, or an image has two labels.
    """
    packed = Packed()
    unreached: list[str] = []
    hold_if_small(files.values())
    for uri, shard in zip(files, map_ahead(_read_shard, files.values(), LISTED_AT_ONCE, LISTED_AT_ONCE), strict=True):
        packed.passed_over.update(shard.others)
        by_sample: defaultdict[str, set[str]] = defaultdict(set)
        for stem, label in shard.labels.items():
            by_sample[_sample(stem)].add(label)
        split, mtime_ns = split_in(uri), stamp(files[uri]).mtime_ns
        for member, read in shard.images.items():
            item = Item(f"{uri}/{member}", split=split, size=shard.sizes[member], mtime_ns=mtime_ns)
            label = _label_of(item.uri, _stem(member), shard.labels, by_sample)
            packed.add(item, label, read)
            if not label and any(by_sample.get(_sample(_stem(member)), ())):
                unreached.append(item.uri)
    if unreached:
        packed.remarks.append(
            f"{len(unreached)} images such as {unreached[0]} have no label, though a label has the same name up to the "
            f"first dot: if it is theirs, call it {_sample(unreached[0].rpartition('/')[2])}.cls"
        )
    return packed


def _read_shard(shard: Location) -> _Shard:
    listed, gzipped = stamp(shard), None
    sizes: dict[str, int] = {}
    images: dict[str, Callable[[], bytes]] = {}
    labels: defaultdict[str, dict[str, str]] = defaultdict(dict)
    others: Counter[str] = Counter()
    kind = "an uncompressed tar file"
    if shard.name.lower().endswith(GZIPPED):
        kind, gzipped = "a tar file compressed by gzip", Gzipped(partial(_packed, shard))
    buffer = FETCHED_AT_ONCE if isinstance(shard, RemotePath) and gzipped is None else DEFAULT_BUFFER_SIZE
    try:
        raw = _raw(shard) if gzipped is None else gzipped.open()
        with _BoundedReader(cast(RawIOBase, raw), buffer) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member, info in _plain_members(archive):
                extension = extension_of(member.rpartition("/")[2])
                if extension in IMAGE_EXTENSIONS or _has_image_header(archive, info, extension):
                    sizes[member] = info.size
                    part = info.offset_data, info.size, listed
                    images[member] = (
                        partial(read_part, shard, *part) if gzipped is None else partial(_read, gzipped, shard, *part)
                    )
                elif extension in {".cls", ".json"}:
                    found, label = labels[_stem(member)], _label(shard, archive, info, extension)
                    if found.setdefault(extension, label) != label:
                        raise SourceError(
                            f"{shard}: expected one {member}, found two: {found[extension]!r} and {label!r}"
                        )
                else:
                    others[extension] += 1
            while gzipped is not None and file.read(READ_LIMIT):  # the checksum is at the end
                pass
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        raise SourceError(f"{shard}: expected {kind}, found a damaged or another file: {error}") from None
    by_stem = {stem: found.get(".cls") or found.get(".json", "") for stem, found in labels.items()}
    return _Shard(images, sizes, by_stem, others)


def _raw(shard: Location) -> RawIOBase | BytesIO:
    return shard.open() if isinstance(shard, RemotePath) else FileIO(shard)


def _packed(shard: Location) -> BufferedReader:
    return BufferedReader(cast(RawIOBase, _raw(shard)), FETCHED_PACKED if isinstance(shard, RemotePath) else 1 << 16)


def _read(gzipped: Gzipped, shard: Location, offset: int, size: int, listed: Stamp) -> bytes:
    """Return a member's bytes from a gzip file; raises as `read_part`."""
    check_size(size)
    check_unchanged(shard, listed)
    with unreadable("shard"):
        return gzipped.read(offset, size)


def _has_image_header(archive: tarfile.TarFile, info: tarfile.TarInfo, extension: str) -> bool:
    file = None if extension in OTHER_EXTENSIONS else archive.extractfile(info)
    return file is not None and holds_image(cast(BinaryIO, file), extension)


def _plain_members(archive: tarfile.TarFile) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """Yield the regular members, without links, hidden names, and names that lead out of the shard."""
    for info in archive:
        name = plain_name(info.name)
        if name and info.isreg() and not info.issparse():
            yield name, info


def _label_of(uri: str, stem: str, labels: Mapping[str, str], by_sample: Mapping[str, set[str]]) -> str:
    """Return the label of an image, given all labels by name without extension, and by name up to the first dot.

    A label of the same name comes first, so that names may hold dots (``2024.05.01.jpg``, ``2024.05.01.cls``). By
    WebDataset's rule, names belong together up to their first dot; it is followed where one of the two has no more
    dots (``1.left.jpg``, ``1.cls``).
    """
    if stem in labels:
        return labels[stem]
    sample = _sample(stem)
    if stem != sample:
        return labels.get(sample, "")
    found = sorted(by_sample.get(sample, ()))
    if len(found) > 1:
        raise SourceError(
            f"{uri}: expected one label, found {found[0]!r} and {found[1]!r}: give the member its own name"
        )
    return found[0] if found else ""


def _stem(member: str) -> str:
    return member.removesuffix(Path(member).suffix)


def _sample(member: str) -> str:
    folder, _, file = member.rpartition("/")
    return f"{folder}/{file.split('.')[0]}" if folder else file.split(".")[0]


def _label(shard: Location, archive: tarfile.TarFile, info: tarfile.TarInfo, extension: str) -> str:
    """Return the label in a ``.cls`` or ``.json`` member; ``""`` if the latter has none."""
    file = archive.extractfile(info)
    data = file.read(LABEL_LIMIT + 1) if file is not None else b""
    expected = f"{shard}: expected a label (number or text) in {info.name}"
    if len(data) > LABEL_LIMIT:
        raise SourceError(f"{expected}, found {info.size} bytes")
    try:
        if extension == ".cls":
            return data.decode().strip()
        document = json.loads(data)  # not as strictly as our own files: others write NaN
    except (ValueError, RecursionError):
        raise SourceError(f"{expected}, found neither text nor JSON") from None
    value = document.get("label") if isinstance(document, dict) else None
    if value is not None and not isinstance(value, int | float | str):
        raise SourceError(f"{expected}, found {type(value).__name__}")
    return text_of(value).strip()
