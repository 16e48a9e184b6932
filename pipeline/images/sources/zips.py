"""``.zip`` archives of images, read in place: a folder in a file."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from io import BufferedReader, FileIO
from itertools import pairwise
from typing import BinaryIO, NamedTuple, cast

import numpy as np

from pipeline.arrays import IntArray
from pipeline.errors import SourceError, UnreadableImageError
from pipeline.images.ahead import map_ahead
from pipeline.images.sources.folder import splits_and_classes
from pipeline.images.sources.items import (
    IMAGE_EXTENSIONS,
    OTHER_EXTENSIONS,
    Item,
    Location,
    Packed,
    check_size,
    extension_of,
    holds_image,
    plain_name,
    read_part,
    split_in,
    stamp,
)
from pipeline.images.sources.remote import LISTED_AT_ONCE, RemotePath, Stamp
from pipeline.tables import SPLIT_WORDS

_HEADER = 30
"""Bytes of a member's header before its name; the lengths of name and extra field are at 26 and 28."""

_ENCRYPTED = 1
"""Bit of a member's flags."""

_MOST = 2**63 - 1
"""Stands for numbers that only forged archives have: it is behind the end of any file, where nothing is read."""

_UNPACKERS: dict[int, Callable[[bytes, int], bytes]] = {
    zipfile.ZIP_STORED: lambda data, size: data,
    zipfile.ZIP_DEFLATED: lambda data, size: zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1),
}


class _Member(NamedTuple):
    """What an archive's directory says of a member; its header and data lie between `start` and `stop`."""

    start: int
    stop: int
    packed_size: int
    size: int
    crc: int
    method: int
    encrypted: int


def read_zips(files: Mapping[str, Location], packed: Packed) -> Iterator[tuple[Item, str]]:
    """Yield the images in archives with their classes.

    Split and class are folders in the archive, as in a folder of images.

    A folder that holds all else (``photos/cat/1.jpg``) is no class. Hidden members are ignored.

    Raises
    ------
    SourceError
        An archive is damaged, or its folders contradict each other.
    """
    for uri, found in zip(files, map_ahead(_list, files.values(), LISTED_AT_ONCE, LISTED_AT_ONCE), strict=True):
        members, others = found
        packed.passed_over.update(others)
        archive, names = files[uri], sorted(members)
        listed, named_split = stamp(archive), split_in(uri)
        table = np.array([members[name] for name in names], np.int64)
        packed.readers[uri] = partial(_read, archive, table, listed)
        for name, (split, label) in zip(names, _splits_and_classes(names, archive), strict=True):
            size = members[name].size
            yield Item(f"{uri}/{name}", split=split or named_split, size=size, mtime_ns=listed.mtime_ns), label


def _list(archive: Location) -> tuple[dict[str, _Member], list[str]]:
    """Return the images in an archive by name, and the extensions of its other members."""
    try:
        raw = archive.open() if isinstance(archive, RemotePath) else FileIO(archive)
        with BufferedReader(raw) as file, zipfile.ZipFile(file) as opened:
            infos = opened.infolist()
            starts = sorted({info.header_offset for info in infos} | {opened.start_dir})
            following = dict(pairwise(starts))
            images: dict[str, _Member] = {}
            others: list[str] = []
            for name, info in _plain_members(infos):
                extension = extension_of(name.rpartition("/")[2])
                known = extension in IMAGE_EXTENSIONS
                if known or (not isinstance(archive, RemotePath) and _has_image_header(opened, info, extension)):
                    images[name] = _member(info, following.get(info.header_offset, info.header_offset))
                else:
                    others.append(extension)
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, OverflowError) as error:
        raise SourceError(f"{archive}: expected a zip archive, found a damaged or another file: {error}") from None
    return images, others


def _member(info: zipfile.ZipInfo, following: int) -> _Member:
    longest = info.header_offset + _HEADER + 2 * 0xFFFF + info.compress_size
    packed = info.header_offset, min(following, longest), info.compress_size
    numbers = *packed, info.file_size, info.CRC, info.compress_type, info.flag_bits & _ENCRYPTED
    return _Member(*(number if 0 <= number < _MOST else _MOST for number in numbers))


def _plain_members(infos: list[zipfile.ZipInfo]) -> Iterator[tuple[str, zipfile.ZipInfo]]:
    """Yield the members that are files, without hidden names, and names that lead out of the archive."""
    for info in infos:
        name = plain_name(info.filename)
        if name and not info.is_dir() and not name.startswith("__MACOSX/"):
            yield name, info


def _has_image_header(archive: zipfile.ZipFile, info: zipfile.ZipInfo, extension: str) -> bool:
    if extension in OTHER_EXTENSIONS:
        return False
    try:
        with archive.open(info) as file:
            return holds_image(cast(BinaryIO, file), extension)
    except (zipfile.BadZipFile, zlib.error, RuntimeError, OSError, EOFError, ValueError):  # RuntimeError: encrypted
        return False


def _splits_and_classes(names: list[str], archive: Location) -> Iterator[tuple[str, str]]:
    """Return split and class of each name, see `read_zips`."""
    below = [name.split("/") for name in names]
    tops = {parts[0] for parts in below}
    if (
        len(tops) == 1
        and SPLIT_WORDS.keys().isdisjoint(top.lower() for top in tops)
        and all(len(parts) > 1 for parts in below)
        and any(len(parts) > 2 for parts in below)
    ):
        below = [parts[1:] for parts in below]
    return splits_and_classes(["/".join(parts) for parts in below], archive)


def _read(archive: Location, members: IntArray, listed: Stamp, _: str, place: int) -> bytes:
    """Return a member's bytes; raises as `read_part`, and `UnreadableImageError` if they are damaged or encrypted."""
    member = _Member(*members[place].tolist())
    check_size(member.size)
    if member.encrypted:
        raise UnreadableImageError("encrypted")
    if member.method not in _UNPACKERS:
        raise UnreadableImageError(f"compressed by method {member.method}, not by deflate")
    found = read_part(archive, member.start, member.stop - member.start, listed)
    try:
        if not found.startswith(b"PK\3\4"):
            raise ValueError("no header")
        start = _HEADER + sum(struct.unpack_from("<HH", found, 26))
        data = _UNPACKERS[member.method](found[start : start + member.packed_size], member.size)
    except (ValueError, struct.error, zlib.error) as error:
        raise UnreadableImageError(f"damaged in its archive: {error}") from None
    if len(data) != member.size or zlib.crc32(data) != member.crc:
        raise UnreadableImageError("damaged in its archive: the checksum differs")
    return data
