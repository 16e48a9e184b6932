"""Tables whose rows belong to images: a key column names the image of each row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from unicodedata import normalize

import numpy as np

from features_cache import nearest
from pipeline.arrays import BoolArray, IntArray, StrArray
from pipeline.errors import TableError
from pipeline.evaluation.leaks import MOST_NAMED
from pipeline.evaluation.targets import some

KEYS = ("uri", "path", "file", "filename", "file_name", "image", "image_id", "id")
"""Columns that name the images, unless the user says which one does; the first of these counts."""

_CHUNK = 1 << 12
_MISSING, _AMBIGUOUS = -1, -2


@dataclass(frozen=True, eq=False)
class KeyedTable:
    """A table whose rows belong to the images that its keys name; keys are unique.

    Parameters
    ----------
    path : Path
    keys : list of str
    joined : dict of str to list of str
        Cells of the columns that are joined to features, by the names of the columns.
    """

    path: Path
    keys: list[str]
    joined: dict[str, list[str]]

    def find(self, uris: StrArray) -> tuple[str, IntArray]:
        """Return how images are found, and for each (n,) the number of its key, or a negative number.

        An image is found by its uri if the table has any of the uris, else by its file name if it has any of these,
        else by its file name without ending. A name that several images or several keys have belongs to none of them.

        Raises
        ------
        TableError
            If the table names no image at all.
        """
        ways = {"uri": _as_uri, "file name": _file_name, "file name without ending": self._stems(uris)}
        if not any("/" in key for key in self.keys) and all("/" in uri for uri in _texts(uris)):
            del ways["uri"]  # which saves time: no key is one
        for way, name_of in ways.items():
            names = [normalize("NFC", name_of(key)) for key in self.keys]
            known = dict(zip(names, range(len(names)), strict=True))
            if len(known) < len(names):
                known |= {name: _AMBIGUOUS for name, count in Counter(names).items() if count > 1}
            images = (normalize("NFC", uri if way == "uri" else name_of(uri)) for uri in _texts(uris))
            found = np.fromiter(map(known.get, images, repeat(_MISSING)), np.int64, len(uris))
            if (found != _MISSING).any():
                counts = np.bincount(found[found >= 0], minlength=len(names))
                found[(found >= 0) & (counts[np.maximum(found, 0)] > 1)] = (
                    _AMBIGUOUS  # several images have the name of one key
                )
                return way, found
        raise TableError(
            f"{self.path} names no image of this source: its first key is {self.keys[0]!r}, and the first image is "
            f"{str(uris[0])!r}; keys are uris, file names, or file names without ending"
        )

    def incomplete(self, found: IntArray) -> BoolArray:
        """Tell which images (n,) that `find` found have an empty cell in a joined column."""
        empty = np.zeros(len(self.keys), bool)
        for cells in self.joined.values():
            empty |= np.fromiter((not cell for cell in cells), bool, len(cells))
        return (found >= 0) & empty[np.maximum(found, 0)]

    def reasons(self, found: IntArray, way: str) -> list[str]:
        """Return why images (n,) have no complete row in the table, ``""`` if they have."""
        why = {_MISSING: f"{self.path.name} does not name it", _AMBIGUOUS: f"its {way} is not unique"}
        empty = f"an empty cell in {', '.join(self.joined)} of {self.path.name}"
        incomplete = self.incomplete(found).tolist()
        return [empty if lacks else why.get(row, "") for row, lacks in zip(found.tolist(), incomplete, strict=True)]

    def left_out(self, uris: StrArray, found: IntArray, way: str, also: Mapping[str, BoolArray]) -> Iterator[str]:
        """Count the images and keys that have no partner, and the images that `also` tells; name the first ones."""
        cases = {
            f"images are not in {self.path.name}": found == _MISSING,
            **also,
            f"images have an empty cell in {', '.join(self.joined)} of {self.path.name}": self.incomplete(found),
            f"images are left out because their {way} is not unique": found == _AMBIGUOUS,
        }
        for what, rows in cases.items():
            if rows.any():
                yield f"{int(rows.sum())} of {len(uris)} {what}: {some(uris[rows][:MOST_NAMED], int(rows.sum()))}"
        unused = np.ones(len(self.keys), bool)
        unused[found[found >= 0]] = False
        if (count := int(unused.sum())) and not (found == _AMBIGUOUS).any():
            first = [self.keys[number] for number in np.flatnonzero(unused)[:MOST_NAMED].tolist()]
            yield f"{count} of {len(self.keys)} keys of {self.path.name} fit no image: {some(first, count)}"

    @staticmethod
    def _stems(uris: StrArray) -> Callable[[str], str]:
        """Return what takes the ending off a file name, if it is one of the images' endings: ``scan.1`` has none."""
        endings: set[str] = set()

        def stem(key: str) -> str:
            if not endings:  # looked for only if this is asked
                endings.update(_ending(uri) for uri in _texts(uris))
            name = _file_name(key)
            ending = _ending(name)
            return name.removesuffix(ending) if ending in endings else name

        return stem


def require_columns(path: Path, header: Sequence[str], names: Iterable[str]) -> None:
    """Raise `TableError` if a table lacks one of the columns `names`."""
    for name in names:
        if name not in header:
            raise TableError(f"{path} has no column {name!r}, but {some(header, len(header))}{nearest(name, header)}")


def key_column(path: Path, header: Sequence[str], key: str | None, taken: Sequence[str] = ()) -> str:
    """Return the column that names the images: `key`, or the first of `KEYS` that is not `taken`."""
    free = {name.lower(): name for name in header if name not in taken}
    found = key or next((free[word] for word in KEYS if word in free), None)
    if found is None:
        raise TableError(f"{path}: say which column names the images (key): {some(header, len(header))}")
    return found


def each_once(path: Path, key: str, columns: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Return the columns, by their names, with each key once; rows of one key must say the same."""
    keys = columns[key]
    if not keys:
        raise TableError(f"{path}: expected at least one row below the header, found none")
    different = set(keys)
    if "" in different:
        raise TableError(f"{path}: expected the name of an image in column {key!r} of each row, found none")
    if len(different) == len(keys):
        return dict(columns)
    last = {one: number for number, one in enumerate(keys)}
    for number, one in enumerate(keys):
        for name, column in columns.items():
            if column[number] != column[last[one]]:
                raise TableError(
                    f"{path} names {one!r} twice, with {name} {column[number]!r} and {column[last[one]]!r}; "
                    "keep the right row"
                )
    return {name: [column[number] for number in last.values()] for name, column in columns.items()}


def _texts(column: StrArray) -> Iterator[str]:
    for start in range(0, len(column), _CHUNK):  # a list of all would double the memory
        yield from column[start : start + _CHUNK].tolist()


def _as_uri(key: str) -> str:
    return key.removeprefix("./")


def _file_name(key: str) -> str:
    return key.rpartition("/")[2]


def _ending(key: str) -> str:
    """Return the last dot of a file name and what follows; ``""`` if there is none."""
    _, dot, ending = _file_name(key).rpartition(".")
    return f"{dot}{ending}" if dot else ""
