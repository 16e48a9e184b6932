"""``.tar`` shards in WebDataset form, plain or compressed by gzip: images and the members that hold their labels."""

from __future__ import annotations

import json
import tarfile
import time
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from io import DEFAULT_BUFFER_SIZE, BufferedReader, BytesIO, FileIO, RawIOBase
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from features_cache import TEXT, atomic_write
from pipeline.arrays import IntArray
from pipeline.errors import SourceError
from pipeline.images.ahead import map_ahead
from pipeline.images.sources.gzipped import Gzipped
from pipeline.images.sources.items import (
    IMAGE_EXTENSIONS,
    OTHER_EXTENSIONS,
    Item,
    Location,
    Packed,
    check_names,
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
from pipeline.images.sources.remote import LISTED_AT_ONCE, RemotePath, Stamp
from pipeline.spec import fingerprint_of
from pipeline.tables import text_of
from pipeline.user_folder import user_folder

GZIPPED = (".tar.gz", ".tgz")

_RULES = 1
"""Of listing a shard; raise it when the same shard could give other names, places or labels."""

LABEL_LIMIT = 1 << 20
"""Most bytes of a ``.cls`` or ``.json`` member that holds a label."""


READ_LIMIT = 1 << 26
"""Most bytes that are read at once from a shard while it is listed: a forged header may ask for any number."""

FETCHED_AT_ONCE = 1 << 24
"""Bytes of a remote shard that are fetched at once while it is listed."""

FETCHED_PACKED = 1 << 21
"""Bytes of a remote gzipped shard that are fetched at once: to list it, and to unpack a block."""


SETTLED_NS = 1_000_000_000
"""The listing of a file that changed less than so long ago is not kept: the next change may have the same time."""


class _BoundedReader(BufferedReader):
    """A file that raises `tarfile.ReadError` where more than `READ_LIMIT` bytes are asked for at once."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > READ_LIMIT:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


class _Shard(NamedTuple):
    """What a shard holds; columns of its images, sorted by the names of their members.

    Attributes
    ----------
    listed : Stamp
        Of the shard before it was listed.
    names : (n,) TEXT
        If several members have the same name, the last one counts.
    starts, sizes : (n,) int64
        Where the bytes of each image are in the shard, or in its content if it is packed, and how many.
    labels : (n,) TEXT
    unreached : str
        Of the images without a label, the name of the first for which a label has the same name up to the first dot.
    unreached_count : int
    others : dict of str to int
        How many other members there are, by their extensions.
    gzipped : Gzipped, optional
        The content of a packed shard.
    """

    listed: Stamp
    names: NDArray[Any]
    starts: IntArray
    sizes: IntArray
    labels: NDArray[Any]
    unreached: str
    unreached_count: int
    others: dict[str, int]
    gzipped: Gzipped | None = None


def read_shards(files: Mapping[str, Location], packed: Packed) -> Iterator[tuple[Item, str]]:
    """Yield the images in shards with their classes.

    The label is the text of the ``.cls`` member that belongs to the image (see `_label_of`), else ``"label"`` in the
    ``.json`` member. Links, hidden members and members whose name leads out of the shard are ignored.

    Raises
    ------
    SourceError
        A shard is damaged, a label is neither text nor a number, or an image has two labels.
    """
    unreached, first = 0, ""
    for uri, shard in zip(files, map_ahead(_list_shard, files.values(), LISTED_AT_ONCE, LISTED_AT_ONCE), strict=True):
        packed.passed_over.update(shard.others)
        split, mtime_ns = split_in(uri), shard.listed.mtime_ns
        packed.readers[uri] = partial(_read, files[uri], shard.listed, shard.gzipped, shard.starts, shard.sizes)
        for member, size, label in zip(shard.names, shard.sizes.tolist(), shard.labels, strict=True):
            yield Item(f"{uri}/{member}", split=split, size=size, mtime_ns=mtime_ns), label
        unreached += shard.unreached_count
        first = first or (shard.unreached and f"{uri}/{shard.unreached}")
    if unreached:
        packed.remarks.append(
            f"{unreached} images such as {first} have no label, though a label has the same name up to the first dot: "
            f"if it is theirs, call it {_sample(first.rpartition('/')[2])}.cls"
        )


def _list_shard(shard: Location) -> _Shard:
    """Return what a shard holds: what an earlier call found, if its size and token are the same, or by reading it."""
    listed, key = stamp(shard), _key(shard)
    try:
        kept = user_folder("shards") / f"{fingerprint_of(shard.as_posix())}.npz"
    except RuntimeError:  # there is no such folder
        return _read_shard(shard, listed)
    if shard.name.lower().endswith(GZIPPED) or listed.size < 0 or not listed.mtime_ns:
        return _read_shard(shard, listed)
    if (known := _recall(kept, key, listed)) is not None:
        return known
    found = _read_shard(shard, listed)
    if isinstance(shard, RemotePath) or time.time_ns() - shard.stat().st_ctime_ns > SETTLED_NS:
        _remember(kept, key, found)
    return found


def _key(shard: Location) -> list[int]:
    """Return what tells whether a shard is the one that was listed: tools may keep its time, but not all of these."""
    if isinstance(shard, RemotePath):
        return [_RULES, *stamp(shard)]
    status = shard.stat()
    return [_RULES, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _recall(kept: Path, key: list[int], listed: Stamp) -> _Shard | None:
    """Return the listing in a file of ours, None if there is none of a shard with this key, or it is damaged."""
    try:
        with kept.open("rb") as stream, np.load(stream) as columns:
            if columns["key"].tolist() != key:
                return None
            first, count, others = json.loads(str(columns["others"]))
            texts = {name: bytes(columns[name]).decode().split("\0")[:-1] for name in ("names", "classes")}
            numbers, starts, sizes = (np.asarray(columns[name], np.int64) for name in ("labels", "starts", "sizes"))
            labels = np.array([*texts["classes"], ""], TEXT)[numbers]
            found = _Shard(listed, np.array(texts["names"], TEXT), starts, sizes, labels, first, count, others)
    except (OSError, ValueError, LookupError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    return found if {len(found.names)} == {len(found.starts), len(found.sizes), len(found.labels)} else None


def _remember(kept: Path, key: list[int], shard: _Shard) -> None:
    """Keep a listing in a file of ours, if it can be."""
    classes, labels = np.unique(shard.labels, return_inverse=True)
    texts = {"names": shard.names.tolist(), "classes": classes.tolist()}
    encoded: dict[str, Any] = {
        name: np.frombuffer("".join(f"{one}\0" for one in some).encode("utf-8", "replace"), np.uint8)
        for name, some in texts.items()
    }
    others = np.array(json.dumps([shard.unreached, shard.unreached_count, shard.others]))
    with suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(kept) as draft:
            np.savez_compressed(
                draft,
                key=np.array(key),
                labels=labels,
                starts=shard.starts,
                sizes=shard.sizes,
                others=others,
                **encoded,
            )


def _read_shard(shard: Location, listed: Stamp) -> _Shard:
    gzipped = None
    sizes: dict[str, int] = {}
    starts: dict[str, int] = {}
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
                    sizes[member], starts[member] = info.size, info.offset_data
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
    by_sample: defaultdict[str, set[str]] = defaultdict(set)
    for stem, label in by_stem.items():
        by_sample[_sample(stem)].add(label)
    names = sorted(sizes)
    check_names(shard.as_posix(), names)
    given = [_label_of(f"{shard}: {name}", _stem(name), by_stem, by_sample) for name in names]
    check_names(shard.as_posix(), by_stem.values())
    unreached = [
        name
        for name, label in zip(names, given, strict=True)
        if not label and any(by_sample.get(_sample(_stem(name)), ()))
    ]
    return _Shard(
        listed,
        np.array(names, TEXT),
        np.array([starts[name] for name in names], np.int64),
        np.array([sizes[name] for name in names], np.int64),
        np.array(given, TEXT),
        unreached[0] if unreached else "",
        len(unreached),
        dict(others),
        gzipped,
    )


def _raw(shard: Location) -> RawIOBase | BytesIO:
    return shard.open() if isinstance(shard, RemotePath) else FileIO(shard)


def _packed(shard: Location) -> BufferedReader:
    return BufferedReader(cast(RawIOBase, _raw(shard)), FETCHED_PACKED if isinstance(shard, RemotePath) else 1 << 16)


def _read(
    path: Location, listed: Stamp, gzipped: Gzipped | None, starts: IntArray, sizes: IntArray, _: str, place: int
) -> bytes:
    """Return a member's bytes; raises as `read_part`."""
    start, size = int(starts[place]), int(sizes[place])
    if gzipped is None:
        return read_part(path, start, size, listed)
    check_size(size)
    check_unchanged(path, listed)
    with unreadable("shard"):
        return gzipped.read(start, size)


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
