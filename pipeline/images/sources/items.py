"""What a source is: a name, ordered items, class names, and a way to read an item's bytes."""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from itertools import chain, islice
from operator import eq
from pathlib import Path
from stat import S_ISREG
from typing import Any, BinaryIO, NamedTuple, overload
from unicodedata import normalize

import numpy as np

from features_cache import TEXT, Rows, UriRange
from pipeline.arrays import IntArray
from pipeline.errors import SourceError, UnreadableImageError
from pipeline.images.formats import START_LENGTH, has_image_header, is_tiff
from pipeline.images.sources.remote import MISSING_SIZE, RemotePath, Stamp
from pipeline.tables import SPLIT_WORDS

IMAGE_EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".gif", ".bmp"}
    | {".dib", ".ppm", ".pgm", ".pbm", ".pnm", ".apng", ".mpo", ".avif", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"}
    | {".ico", ".pcx", ".dds"}
)
"""Extensions, in lower case, of files that are taken for images without a look inside."""

FOREIGN_EXTENSIONS = frozenset(
    {".heic", ".heif", ".hif", ".jxl", ".psd", ".psb", ".xcf", ".svg", ".tga", ".exr"}
    | {".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".sr2", ".raf", ".orf", ".rw2", ".pef", ".srw", ".raw"}
)
"""Extensions, in lower case, of pictures that are not read here. Camera raw files begin like a TIFF, but are none."""

OTHER_EXTENSIONS = frozenset(
    {
        ".csv",
        ".tsv",
        ".jsonl",
        ".parquet",
        ".arrow",
        ".tar",
        ".tgz",
        ".json",
        ".cls",
        ".txt",
        ".xml",
        ".md",
        ".html",
        ".yaml",
        ".yml",
        ".py",
        ".h5",
    }
    | {".zip", ".gz", ".npy", ".npz", ".mp4", ".mov", ".avi", ".wav", ".xmp", ".aae"}
)
"""Extensions, in lower case, of files that are no images; listing a folder does not open them."""

NO_EXTENSION = "without extension"

EXTENSIONS_NAMED = 8
"""Extensions that the note on files left aside names; it adds up the others."""

FILE_LIMIT = 1 << 30
"""Most bytes of one image file; a larger one, such as a sparse file, is unreadable."""

SHARD_CHANGED = "the shard changed after it was listed"

TIME_LIMIT = 2**63 - 1
"""Latest time in nanoseconds that a cache can store (in the year 2262); later ones count as this one."""

_AT_ONCE = 1 << 12
"""Items that are Python objects at once."""
Location = Path | RemotePath
"""Where a file or folder is: on this machine, or behind a URL."""


class Item(NamedTuple):
    """One image of a source.

    Attributes
    ----------
    uri : str
        POSIX path relative to the source; unique in it.
    label : int
        Index into the source's class names, -1 for none.
    split : str
        ``""``, ``"train"``, ``"val"`` or ``"test"``.
    group : str
        What must stay on one side of a split (a person, a scene); ``""`` for none.
    size : int
        Bytes when listed (of a row of a table, those of the table); -1 if the file was missing, or if the listing tells
        no size.
    mtime_ns : int
        Modification time when listed, in nanoseconds, at most `TIME_LIMIT`, or a number that stands for the version of
        a remote object; 0 if the file was missing, or if the listing tells neither.
    """

    uri: str
    label: int = -1
    split: str = ""
    group: str = ""
    size: int = MISSING_SIZE
    mtime_ns: int = 0


class Items(Sequence[Item]):
    """Items of a source, kept as columns: about 80 bytes each, with short names.

    Parameters
    ----------
    rows : Rows
        The columns; their texts are arrays of `TEXT`.
    """

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    @classmethod
    def of(cls, items: Iterable[Item], location: str = "") -> Items:
        """Return `items` in the same order.

        Raises `SourceError`, which names the location, if a uri or group cannot be stored.
        """
        texts: tuple[list[str], ...] = [], [], []  # joined by NUL, in which they take the least memory
        numbers = array("q"), array("q"), array("q")
        iterator = iter(items)
        while chunk := list(islice(iterator, _AT_ONCE)):
            uris, labels, splits, groups, sizes, times = zip(*chunk, strict=True)
            check_names(location, chain(uris, groups))
            for column, some in zip(texts, (uris, splits, groups), strict=True):
                column.append("\0".join(some))
            bounded = (list(map(_bounded, some)) for some in (sizes, times))
            for number, values in zip(numbers, (labels, *bounded), strict=True):
                number.extend(values)
        named = [_unjoined(column, len(numbers[0])) for column in texts]
        counted = [np.frombuffer(number, np.int64) for number in numbers]
        return cls(Rows(named[0], counted[0], *named[1:], *counted[1:]))

    def set_stamps(self, stamp_of: Callable[[str], Stamp]) -> None:
        """Set size and modification time of each item by its uri."""
        for row, uri in enumerate(self.rows.uris):
            size, mtime_ns = stamp_of(uri)
            self.rows.sizes[row], self.rows.mtimes_ns[row] = _bounded(size), _bounded(mtime_ns)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, where: int) -> Item: ...
    @overload
    def __getitem__(self, where: slice | IntArray) -> Items: ...
    def __getitem__(self, where: Any) -> Any:
        columns: list[Any] = [getattr(self.rows, one.name)[where] for one in fields(Rows)]
        if isinstance(where, slice | np.ndarray):
            return Items(Rows(*columns))
        uri, label, split, group, size, mtime_ns = columns
        return Item(uri, int(label), split, group, int(size), int(mtime_ns))

    def __iter__(self) -> Iterator[Item]:
        for start in range(0, len(self), _AT_ONCE):
            part = self[start : start + _AT_ONCE].rows
            yield from map(Item, *(getattr(part, one.name).tolist() for one in fields(Rows)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))

    __hash__ = None  # type: ignore[assignment]


def _bounded(value: int) -> int:
    return max(-TIME_LIMIT, min(value, TIME_LIMIT))


def _unjoined(joined: list[str], count: int) -> Any:
    """Return the texts, `count` in all, that are joined by NUL in each of `joined`, which is emptied.

    Texts that are all empty, as most splits and groups are, take no memory.
    """
    if not any(some.strip("\0") for some in joined):
        return np.broadcast_to(np.array("", TEXT), count)
    column, end = np.empty(count, TEXT), count
    while joined:
        some = np.array(joined.pop().split("\0"), TEXT)
        column[end - len(some) : end] = some
        end -= len(some)
    return column


@dataclass
class Packed:
    """What is in files that hold many images, apart from the images' items.

    Attributes
    ----------
    readers : dict of str to callable
        By a file's path relative to the source: returns the bytes of an image, by the rest of its uri behind the
        file's and by its place among the file's images in order of their uris, or raises `UnreadableImageError`. So a
        reader need not keep names.
    passed_over, remarks
        As in `ImageSource`.
    uris : sequence of str
        Of all images, sorted.
    """

    readers: dict[str, Callable[[str, int], bytes]] = field(default_factory=dict)
    passed_over: Counter[str] = field(default_factory=Counter)
    remarks: list[str] = field(default_factory=list)
    uris: Sequence[str] = ()

    def read(self, item: Item) -> bytes:
        """Return the bytes of an image."""
        parts = item.uri.split("/")
        files = ("/".join(parts[:end]) for end in range(1, len(parts)))
        file = next(name for name in files if name in self.readers)
        place = bisect_left(self.uris, item.uri) - bisect_left(self.uris, f"{file}/")
        return self.readers[file](item.uri[len(file) + 1 :], place)


@dataclass(frozen=True)
class ImageSource:
    """An ordered list of images and the way to their bytes.

    Attributes
    ----------
    name : str
        Handle by which users select the source.
    location : str
        Absolute POSIX path, a URL, or ``"digits"``.
    classes : tuple of str
        Class names in plain text order, so ``"10"`` comes before ``"9"``.
    items : Items
        Sorted by uri.
    reader : callable
        Returns an item's bytes or raises `UnreadableImageError`; many threads may call it at once.
    passed_over : dict of str to int
        How many files beside the images were left aside, by their extensions in lower case.
    remarks : tuple of str
        What else the user should know about the source.
    remote : bool
        Whether reading an item waits for a network, so that many should be read at once.
    within : UriRange, optional
        The uris that were listed; None for all.
    """

    name: str
    location: str
    classes: tuple[str, ...]
    items: Items = field(repr=False)
    reader: Callable[[Item], bytes] = field(repr=False)
    passed_over: Mapping[str, int] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    remote: bool = False
    within: UriRange | None = None

    @property
    def notes(self) -> list[str]:
        """What the user should know: `remarks`, and which files were left aside."""
        counted = sorted(self.passed_over.items(), key=lambda pair: (-pair[1], pair[0]))
        counts = [f"{count} {extension}" for extension, count in sorted(counted[:EXTENSIONS_NAMED])]
        if rest := sum(count for _, count in counted[EXTENSIONS_NAMED:]):
            counts.append(f"{rest} with other extensions")
        if not counts:
            return [*self.remarks]
        remedy = ": save pictures among them as .jpg or .png" if set(self.passed_over) - OTHER_EXTENSIONS else ""
        return [*self.remarks, f"{', '.join(counts)} passed over because thawline cannot read them{remedy}"]

    def read(self, item: Item) -> bytes:
        """Return the encoded bytes of `item`.

        Raises
        ------
        UnreadableImageError
            The file vanished, may not be read, or belongs to a shard that changed.
        SourceError
            The server does not answer, or refuses.
        """
        return self.reader(item)


def build_source(
    name: str, location: str, labelled: Iterable[tuple[Item, str]], reader: Callable[[Item], bytes]
) -> ImageSource:
    """Return a source: its items sorted by uri, its classes in Unicode form NFC and numbered in plain text order.

    Parameters
    ----------
    name, location : str
        As in `ImageSource`.
    labelled : iterable of (Item, str)
        Items without a label, each with the name of its class (``""`` for none).
    reader : callable
        As in `ImageSource`.

    Raises
    ------
    SourceError
        The location, a name, a label or a group is not valid UTF-8 or holds a NUL, which a cache cannot store.
    """
    numbers: dict[str, int] = {}
    numbered = (Item(one.uri, numbers.setdefault(label, len(numbers)), *one[2:]) for one, label in labelled)
    return sort_source(name, location, Items.of(numbered, location), list(numbers), reader)


def sort_source(
    name: str, location: str, items: Items, names: Iterable[str], reader: Callable[[Item], bytes]
) -> ImageSource:
    """Return a source as `build_source`, from items whose labels are indices into `names`."""
    names = list(names) if items else []
    check_names(location, [location, *names])
    composed = [normalize("NFC", name) for name in names]
    classes = tuple(sorted(set(composed) - {""}))
    numbers = {name: number for number, name in enumerate(classes)} | {"": -1}
    rows, uris = items.rows, np.asarray(items.rows.uris)
    if len(items):
        rows.labels[:] = np.array([numbers[name] for name in composed])[rows.labels]
    if not (uris[1:] >= uris[:-1]).all():
        order = np.argsort(uris, kind="stable")
        del uris
        for one in fields(Rows):  # one by one, so that only one is there twice
            column = getattr(rows, one.name)
            if column.strides != (0,):  # whose entries differ
                object.__setattr__(rows, one.name, column[order])
    remarks = tuple(_alike_names(classes))
    return ImageSource(name=name, location=location, classes=classes, items=items, reader=reader, remarks=remarks)


def check_names(location: str, names: Iterable[str]) -> None:
    """Raise `SourceError`, which names the location, if a name cannot be stored in a cache."""
    names = list(names)
    if not _can_be_stored("".join(names)):
        found = next(name for name in names if not _can_be_stored(name))
        where = ascii(location)[1:-1]
        raise SourceError(f"{where}: expected names in UTF-8 without NUL, found {found!a}: rename it")


def _alike_names(classes: Iterable[str]) -> Iterator[str]:
    """Name the classes that differ by case, blanks or compatible characters only."""
    alike: defaultdict[str, list[str]] = defaultdict(list)
    for name in classes:
        alike["".join(normalize("NFKC", name).casefold().split())].append(name)
    for names in alike.values():
        if len(names) > 1:
            found = ", ".join(map(repr, names))
            yield f"classes {found} differ by case, blanks or form only: give them one name if they are one class"


def _can_be_stored(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a file name that the system gave as raw bytes
        return False
    return "\0" not in text


def split_in(path: str) -> str:
    """Return the split that the path of a shard names, ``""`` for none or several.

    Examples
    --------
    >>> split_in("imagenet-validation-00.tar"), split_in("train-val.zip")
    ('val', '')
    """
    words = re.split(r"[^a-z]+", path.lower())
    splits = {SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS}
    return splits.pop() if len(splits) == 1 else ""


def plain_name(name: str) -> str:
    """Return the name of a member of a packed file, ``""`` if it is hidden or leads out of the file.

    Examples
    --------
    >>> plain_name("./cat//1.jpg"), plain_name("../1.jpg"), plain_name("cat/.1.jpg")
    ('cat/1.jpg', '', '')
    """
    parts = [part for part in name.split("/") if part not in {"", "."}]
    return "" if name.startswith("/") or any(part.startswith(".") for part in parts) else "/".join(parts)


def extension_of(name: str) -> str:
    """Return what follows the last dot of a file's name, with the dot, in lower case; `NO_EXTENSION` if there is none.

    Examples
    --------
    >>> extension_of("Photo.JPG"), extension_of("photo")
    ('.jpg', 'without extension')
    """
    _, dot, extension = name.rpartition(".")  # pathlib's suffix takes longer than the walk of a folder
    return f".{extension.lower()}" if dot else NO_EXTENSION


def is_image_file(path: Location, extension: str) -> bool:
    """Tell whether a regular file is an image: by its extension if that says so, else by its header.

    Headers of remote files are not read: it would take a request each.
    """
    if extension in IMAGE_EXTENSIONS:
        return True
    if extension in OTHER_EXTENSIONS or isinstance(path, RemotePath):
        return False
    try:
        with path.open("rb") as file:
            return holds_image(file, extension)
    except OSError:
        return False


def holds_image(file: BinaryIO, extension: str) -> bool:
    """Tell whether an open file is an image by its header, although its extension is not that of one."""
    if extension in FOREIGN_EXTENSIONS:
        if is_tiff(file.read(START_LENGTH)):
            return False
        file.seek(0)
    return has_image_header(file)


def is_file_of(path: Location, extensions: Collection[str]) -> bool:
    """Tell whether `path` is a regular file, or a link to one, with one of `extensions` (in lower case)."""
    return path.suffix.lower() in extensions and path.is_file()


def check_size(size: int) -> None:
    """Raise `UnreadableImageError` if a file of `size` bytes is too large to be read into memory."""
    if size > FILE_LIMIT:
        raise UnreadableImageError(f"{size} bytes, more than {FILE_LIMIT}")


def stamp(path: Location) -> Stamp:
    """Return what tells whether a file changes later."""
    if isinstance(path, RemotePath):
        return path.stat()
    status = path.stat()
    return Stamp(status.st_size, status.st_mtime_ns)


def read_file(path: Location) -> bytes:
    """Return the bytes of a regular file.

    Raises
    ------
    UnreadableImageError
        With a short reason: no such file, permission denied, not a regular file, too large.
    """
    with unreadable("file"):
        if isinstance(path, RemotePath):
            return path.read()
        status = path.stat()
        if not S_ISREG(status.st_mode):  # opening a named pipe would wait forever
            raise UnreadableImageError("not a regular file")
        check_size(status.st_size)
        return path.read_bytes()


def read_part(path: Location, start: int, size: int, listed: Stamp) -> bytes:
    """Return `size` bytes of a shard from `start` on.

    Raises
    ------
    UnreadableImageError
        The shard is gone, cannot be read, or changed after it had the stamp `listed`; or the part is too large.
    """
    check_size(size)
    with unreadable("shard"):
        if isinstance(path, RemotePath):
            data = path.read(start, start + size)
        else:
            with path.open("rb") as file:
                if stamp(path) != listed:
                    raise UnreadableImageError(SHARD_CHANGED)
                file.seek(start)
                data = file.read(size)
        if len(data) != size:
            raise UnreadableImageError(SHARD_CHANGED)
        return data


def check_unchanged(path: Location, listed: Stamp) -> None:
    """Raise `UnreadableImageError` if a local shard changed after it had the stamp `listed`."""
    with unreadable("shard"):
        if not isinstance(path, RemotePath) and stamp(path) != listed:
            raise UnreadableImageError(SHARD_CHANGED)


@contextmanager
def unreadable(word: str) -> Iterator[None]:
    """Turn the errors of reading a file into short reasons."""
    try:
        yield
    except FileNotFoundError:
        raise UnreadableImageError(f"no such {word}") from None
    except PermissionError:
        raise UnreadableImageError("permission denied") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UnreadableImageError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
