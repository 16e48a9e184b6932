"""``.tar`` shards in WebDataset form: images and the members that hold their labels."""

from __future__ import annotations

import json
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from io import BufferedReader, FileIO
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from pipeline.errors import SourceError, UnreadableImageError
from pipeline.images.sources.folder import walk
from pipeline.images.sources.items import (
    IMAGE_EXTENSIONS,
    OTHER_EXTENSIONS,
    ImageSource,
    Item,
    build_source,
    check_size,
    extension_of,
    holds_image,
    is_file_of,
)
from pipeline.tables import SPLIT_WORDS, text_of

SHARD_EXTENSION = ".tar"

LABEL_LIMIT = 1 << 20
"""Most bytes of a ``.cls`` or ``.json`` member that holds a label."""


READ_LIMIT = 1 << 26
"""Most bytes that are read at once from a shard while it is listed: a forged header may ask for any number."""


class _BoundedReader(BufferedReader):
    """A file that raises `tarfile.ReadError` where more than `READ_LIMIT` bytes are asked for at once."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > READ_LIMIT:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


class Extent(NamedTuple):
    """Where a member's bytes are: shard, offset and size in bytes, and the shard's own size and time when listed."""

    shard: Path
    offset: int
    size: int
    shard_size: int
    shard_mtime_ns: int


def open_shards(path: Path) -> ImageSource | None:
    """Return the images in an uncompressed ``.tar`` shard, or in all shards under a folder; None if there is none.

    The label is the text of the ``.cls`` member that belongs to the image (see `_label_of`), else ``"label"`` in the
    ``.json`` member. The split is the one split word in the shard's path (``train-000.tar``,
    ``set-validation-01.tar``, ``test/7.tar``); there is none if the path has no such word, or two. Links, hidden
    members and members whose name leads out of the shard are ignored. Uris are ``shard/member``, with the shard's
    path relative to the folder.

    Raises
    ------
    SourceError
        A shard is damaged, a label is neither text nor a number, or an image has two labels.
    """
    passed_over: Counter[str] = Counter()
    if path.is_dir():
        root, name = path, path.name
        shards, others = walk(path, lambda _, extension: extension == SHARD_EXTENSION)
        passed_over.update(others)
    elif is_file_of(path, {SHARD_EXTENSION}):
        root, name = path.parent, path.stem
        shards = [Item(path.name)]
    else:
        return None
    labelled: list[tuple[Item, str]] = []
    extents: dict[str, Extent] = {}
    unreached: list[str] = []
    for shard in sorted(shards):
        split = split_in(shard.uri)
        images, labels, others = _read_shard(root / shard.uri)
        passed_over.update(others)
        by_sample: defaultdict[str, set[str]] = defaultdict(set)
        for stem, label in labels.items():
            by_sample[_sample(stem)].add(label)
        for member, extent in images.items():
            item = Item(f"{shard.uri}/{member}", split=split, size=extent.size, mtime_ns=extent.shard_mtime_ns)
            extents[item.uri] = extent
            label = _label_of(item.uri, _stem(member), labels, by_sample)
            labelled.append((item, label))
            if not label and any(by_sample.get(_sample(_stem(member)), ())):
                unreached.append(item.uri)
    source = build_source(name, path.as_posix(), labelled, lambda item: _read(extents[item.uri]))
    remarks = source.remarks
    if unreached:
        remarks = (
            *remarks,
            f"{len(unreached)} images such as {unreached[0]} have no label, though a label has the same name up to the "
            f"first dot: if it is theirs, call it {_sample(unreached[0].rpartition('/')[2])}.cls",
        )
    return replace(source, passed_over=passed_over, remarks=remarks)


def split_in(path: str) -> str:
    """Return the split that a shard's path names, ``""`` for none or several."""
    words = re.split(r"[^a-z]+", path.lower())
    splits = {SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS}
    return splits.pop() if len(splits) == 1 else ""


def _read_shard(shard: Path) -> tuple[dict[str, Extent], dict[str, str], Counter[str]]:
    """Return the shard's images by member name, its labels by name without extension, and how many others there are.

    The others are counted by their extensions. If several images have the same name, the last one counts.
    """
    status = shard.stat()
    images: dict[str, Extent] = {}
    labels: defaultdict[str, dict[str, str]] = defaultdict(dict)
    others: Counter[str] = Counter()
    try:
        with _BoundedReader(FileIO(shard)) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member, info in _plain_members(archive):
                extension = extension_of(member.rpartition("/")[2])
                if extension in IMAGE_EXTENSIONS or _has_image_header(archive, info, extension):
                    images[member] = Extent(shard, info.offset_data, info.size, status.st_size, status.st_mtime_ns)
                elif extension in {".cls", ".json"}:
                    found, label = labels[_stem(member)], _label(shard, archive, info, extension)
                    if found.setdefault(extension, label) != label:
                        raise SourceError(
                            f"{shard}: expected one {member}, found two: {found[extension]!r} and {label!r}"
                        )
                else:
                    others[extension] += 1
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        raise SourceError(
            f"{shard}: expected an uncompressed tar file, found a damaged or another file: {error}"
        ) from None
    by_stem = {stem: found.get(".cls") or found.get(".json", "") for stem, found in labels.items()}
    return images, by_stem, others


def _has_image_header(archive: tarfile.TarFile, info: tarfile.TarInfo, extension: str) -> bool:
    file = None if extension in OTHER_EXTENSIONS else archive.extractfile(info)
    return file is not None and holds_image(cast(BinaryIO, file), extension)


def _plain_members(archive: tarfile.TarFile) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """Yield the regular members, without links, hidden names, and names that lead out of the shard."""
    for info in archive:
        parts = [part for part in info.name.split("/") if part not in {"", "."}]
        inside = parts and not info.name.startswith("/") and not any(part.startswith(".") for part in parts)
        if inside and info.isreg() and not info.issparse():
            yield "/".join(parts), info


def _read(extent: Extent) -> bytes:
    """Return a member's bytes, straight from the shard.

    Raises
    ------
    UnreadableImageError
        The shard is gone, cannot be read, or changed after it was listed; or the member is too large.
    """
    check_size(extent.size)
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


def _label(shard: Path, archive: tarfile.TarFile, info: tarfile.TarInfo, extension: str) -> str:
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
