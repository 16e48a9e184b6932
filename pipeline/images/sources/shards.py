"""``.tar`` shards in WebDataset form: members that share a name up to its first dot are one sample."""

from __future__ import annotations

import json
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import SourceError, UnreadableImageError
from pipeline.images.sources.folder import SPLIT_WORDS
from pipeline.images.sources.items import IMAGE_SUFFIXES, Entry, ImageSource, Item, build_source

SHARD_SUFFIX = ".tar"

LABEL_LIMIT = 1 << 20
"""Bytes that a ``.cls`` or ``.json`` member may have; more is no label."""


class Extent(NamedTuple):
    """Where a member's bytes stand: shard, offset and size in bytes, and the shard's own size and time when listed."""

    shard: Path
    offset: int
    size: int
    shard_size: int
    shard_mtime_ns: int


class ShardReader:
    """Reads members straight from their place in an uncompressed shard."""

    def __init__(self, extents: dict[str, Extent]) -> None:
        self.extents = extents

    def __call__(self, item: Item) -> bytes:
        """Return the member's bytes; `UnreadableImageError` if the shard is gone or is not the one that was listed."""
        extent = self.extents[item.uri]
        try:
            with extent.shard.open("rb") as file:
                status = extent.shard.stat()
                if (status.st_size, status.st_mtime_ns) != (extent.shard_size, extent.shard_mtime_ns):
                    raise UnreadableImageError("the shard changed after it was listed")
                file.seek(extent.offset)
                data = file.read(extent.size)
        except FileNotFoundError:
            raise UnreadableImageError("no such shard") from None
        except PermissionError:
            raise UnreadableImageError("permission denied") from None
        except OSError as error:
            raise UnreadableImageError(f"cannot be read: {error.strerror}") from None
        if len(data) != extent.size:
            raise UnreadableImageError("the shard changed after it was listed")
        return data


def open_shards(location: Path, shards: list[Path]) -> ImageSource:
    """Return the images in the shards.

    The label is the text of the sample's ``.cls`` member, else ``"label"`` in its ``.json`` member. The split is the
    one split word in the shard's path (``train-000.tar``, ``set-validation-01.tar``, ``test/7.tar``); none where there
    is no such word or there are two. Links, hidden members and members that climb out of the shard are passed over.

    Parameters
    ----------
    location : Path
        Absolute: a folder, or the only shard. Uris are ``shard/member`` with the shard's path relative to the folder.
    shards : list of Path
        Uncompressed tar files.

    Raises
    ------
    SourceError
        A shard is damaged, or a label is no text or number.
    """
    alone = shards == [location]
    root = location.parent if alone else location
    entries: list[Entry] = []
    extents: dict[str, Extent] = {}
    for shard in shards:
        prefix = shard.relative_to(root).as_posix()
        split = split_in(prefix)
        images, labels = _read_shard(shard)
        for member, extent in images.items():
            uri = f"{prefix}/{member}"
            extents[uri] = extent
            entries.append(Entry(uri, labels.get(_sample(member), ""), split, "", extent.size, extent.shard_mtime_ns))
    name = location.stem if alone else location.name
    return build_source(name, location.as_posix(), entries, ShardReader(extents))


def split_in(path: str) -> str:
    """Return the split that a shard's path names, ``""`` if none or several."""
    words = re.split(r"[^a-z]+", path.lower())
    splits = {SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS}
    return splits.pop() if len(splits) == 1 else ""


def _read_shard(shard: Path) -> tuple[dict[str, Extent], dict[str, str]]:
    """Return the shard's images by member name and its labels by sample; of a name that occurs twice, the last."""
    status = shard.stat()
    images: dict[str, Extent] = {}
    labels: defaultdict[str, dict[str, str]] = defaultdict(dict)
    try:
        with tarfile.open(shard, "r:") as archive:
            for member, info in _plain_members(archive):
                suffix = Path(member).suffix.lower()
                if suffix in IMAGE_SUFFIXES:
                    images[member] = Extent(shard, info.offset_data, info.size, status.st_size, status.st_mtime_ns)
                elif suffix in {".cls", ".json"}:
                    labels[_sample(member)][suffix] = _label(shard, archive, info, suffix)
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        raise SourceError(
            f"{shard}: expected an uncompressed tar file, found a damaged one or another: {error}"
        ) from None
    return images, {sample: found.get(".cls") or found.get(".json", "") for sample, found in labels.items()}


def _plain_members(archive: tarfile.TarFile) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """Yield regular members: no link, no hidden name, none whose name climbs out of the shard."""
    for info in archive:
        parts = [part for part in info.name.split("/") if part not in {"", "."}]
        inside = parts and not info.name.startswith("/") and not any(part.startswith(".") for part in parts)
        if inside and info.isreg() and not info.issparse():
            yield "/".join(parts), info


def _sample(member: str) -> str:
    folder, _, file = member.rpartition("/")
    return f"{folder}/{file.split('.')[0]}"


def _label(shard: Path, archive: tarfile.TarFile, info: tarfile.TarInfo, suffix: str) -> str:
    """Return the label that a ``.cls`` or ``.json`` member holds, ``""`` where the latter has none."""
    file = archive.extractfile(info)
    data = file.read(LABEL_LIMIT + 1) if file is not None else b""
    expected = f"{shard}: expected a label (number or text) in {info.name}"
    if len(data) > LABEL_LIMIT:
        raise SourceError(f"{expected}, found {info.size} bytes")
    try:
        if suffix == ".cls":
            return data.decode().strip()
        document = json.loads(data)
    except (ValueError, RecursionError):
        raise SourceError(f"{expected}, found neither text nor JSON") from None
    value = document.get("label") if isinstance(document, dict) else None
    if value is not None and not isinstance(value, int | str):
        raise SourceError(f"{expected}, found {type(value).__name__}")
    return "" if value is None else str(value).strip()
