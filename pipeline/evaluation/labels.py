"""Labels that a table gives to the images of a cache, joined by the names of the images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from pathlib import Path
from unicodedata import normalize

import numpy as np

from features_cache import CacheFile, nearest
from pipeline.arrays import IntArray, StrArray
from pipeline.errors import TableError
from pipeline.evaluation.leaks import MOST_NAMED
from pipeline.spec import fingerprint_of
from pipeline.tables import SPLIT_WORDS, read_columns

KEYS = ("uri", "path", "file", "filename", "file_name", "image", "image_id", "id")
"""Columns that name the images, unless the user says which one does; the first of these counts."""
TARGET = "label"
"""The column that holds the labels, unless the user says which one does."""

_CHUNK = 1 << 16
_MISSING, _AMBIGUOUS = -1, -2
_NOT_GIVEN = ("nan", "na", "n/a", "null", "none")


@dataclass(frozen=True, eq=False)
class RowLabels:
    """What is known of n rows; columns of length n.

    Parameters
    ----------
    classes : tuple of str
    labels : (n,) int64
        Indices into `classes`, -1 for none.
    splits, groups : (n,) str
    notes : tuple of str
        What a user should know about where these came from.
    """

    classes: tuple[str, ...]
    labels: IntArray
    splits: StrArray
    groups: StrArray
    notes: tuple[str, ...] = ()


def labels_of(file: CacheFile) -> RowLabels:
    """Return the labels that the source itself gave to the rows of a cache file."""
    return RowLabels(tuple(file.classes), np.asarray(file.labels), file.splits, file.groups)


@dataclass(frozen=True, eq=False)
class LabelsTable:
    """A table that gives a label to each image that it names; keys are unique.

    Parameters
    ----------
    path : Path
    target : str
        Name of the column of labels.
    keys, labels : list of str
        ``""`` is no label.
    splits, groups : list of str, optional
        None where the table has no such column.
    """

    path: Path
    target: str
    keys: list[str]
    labels: list[str]
    splits: list[str] | None
    groups: list[str] | None

    @cached_property
    def digest(self) -> str:
        """Digest of all that the labels of a cache's rows depend on; the table's name does not count."""
        return fingerprint_of([self.target, self.keys, self.labels, self.splits, self.groups])

    def join(self, uris: StrArray, splits: StrArray, groups: StrArray) -> RowLabels:
        """Give labels to rows.

        An image is found by its uri if the table has any of the uris, else by its file name if it has any of these,
        else by its file name without ending. A name that several images or several keys have labels none of them.

        Parameters
        ----------
        uris : (n,) str
            Names of the images.
        splits, groups : (n,) str
            Those of the source, which hold where the table has no such column.

        Raises
        ------
        TableError
            If the table names no image at all, or labels none.
        """
        way, found = self._find(uris)
        labelled = found >= 0
        if not labelled.any():
            raise TableError(
                f"{self.path}: no {way} in it belongs to exactly one image and one key; name images by their uris, as "
                "cache export does"
            )
        cells = [self.labels[one] for one in found[labelled].tolist()]
        names = {name: normalize("NFC", name) for name in dict.fromkeys(cells)}
        classes = tuple(sorted(set(names.values()) - {""}))
        if not classes:
            raise TableError(f"{self.path}: column {self.target!r} is empty for all images of this source")
        numbers = {name: number for number, name in enumerate(classes)} | {"": -1}
        labels = np.full(len(uris), -1)
        codes = {cell: numbers[name] for cell, name in names.items()}
        labels[labelled] = np.fromiter(map(codes.__getitem__, cells), np.int64, len(cells))
        own = {"split": self.splits, "group": self.groups}
        columns = {"split": splits, "group": groups}
        for name, column in own.items():
            if column is not None:
                columns[name] = np.full(len(uris), "", object)
                columns[name][labelled] = [column[one] for one in found[labelled].tolist()]
                columns[name] = columns[name].astype(np.str_)
        joined = self._joined(way, [name for name, column in own.items() if column is not None])
        notes = (joined, *self._left_out(uris, found, labels, way), *_odd(classes, self.target))
        return RowLabels(classes, labels, columns["split"], columns["group"], notes)

    def _find(self, uris: StrArray) -> tuple[str, IntArray]:
        """Return how images are found, and for each the number of its key, or why it has none."""
        ways = {"uri": _as_uri, "file name": _file_name, "file name without ending": self._stems(uris)}
        for way, name_of in ways.items():
            names = [normalize("NFC", name_of(key)) for key in self.keys]
            known = dict(zip(names, range(len(names)), strict=True))
            if len(known) < len(names):
                known |= {name: _AMBIGUOUS for name, count in Counter(names).items() if count > 1}
            images = (normalize("NFC", uri if way == "uri" else name_of(uri)) for uri in _texts(uris))
            found = np.fromiter(map(known.get, images, repeat(_MISSING)), np.int64, len(uris))
            if (found != _MISSING).any():
                _, inverse, counts = np.unique(found, return_inverse=True, return_counts=True)
                found[(counts[inverse] > 1) & (found >= 0)] = _AMBIGUOUS  # several images have the name of one key
                return way, found
        raise TableError(
            f"{self.path} names no image of this source: its first key is {self.keys[0]!r}, and the first image is "
            f"{str(uris[0])!r}; keys are uris, file names, or file names without ending"
        )

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

    def _joined(self, way: str, also: Sequence[str]) -> str:
        given = f", and so do {' and '.join(f'{name}s' for name in also)}" if also else ""
        return f"labels come from column '{self.target}' of {self.path.name}, joined by {way}{given}"

    def _left_out(self, uris: StrArray, found: IntArray, labels: IntArray, way: str) -> Iterator[str]:
        """Count the rows and keys that have no partner, and name the first ones."""
        cases = {
            f"images are not in {self.path.name}": found == _MISSING,
            f"images have no label in {self.path.name}": (found >= 0) & (labels < 0),
            f"images are left out because their {way} is not unique": found == _AMBIGUOUS,
        }
        for what, rows in cases.items():
            if rows.any():
                yield f"{int(rows.sum())} of {len(uris)} {what}: {_some(uris[rows][:MOST_NAMED], int(rows.sum()))}"
        unused = np.ones(len(self.keys), bool)
        unused[found[found >= 0]] = False
        if (count := int(unused.sum())) and not (found == _AMBIGUOUS).any():
            first = [self.keys[number] for number in np.flatnonzero(unused)[:MOST_NAMED].tolist()]
            yield f"{count} of {len(self.keys)} keys of {self.path.name} fit no image: {_some(first, count)}"


def read_labels(path: str | Path, target: str | None = None, key: str | None = None) -> LabelsTable:
    """Read a table that labels images, with their splits and groups where it has columns ``split`` and ``group``.

    Parameters
    ----------
    path : str or Path
        See `pipeline.tables.read_columns`.
    target : str, optional
        The column of labels: by default ``label``, or else the only column that is neither key, split nor group.
    key : str, optional
        The column that names images: by default the first that is called as one of `KEYS`.

    Raises
    ------
    TableError
        If a column is missing, a split is unknown, or an image is named twice with different labels.
    """
    path = Path(path)
    roles: dict[str, str] = {}

    def choose(header: Sequence[str]) -> list[str]:
        roles.update(_roles(path, header, target, key))
        return list(dict.fromkeys(roles.values()))

    columns = read_columns(path, choose)
    found = {role: columns[name] for role, name in roles.items()}
    if not found["key"]:
        raise TableError(f"{path}: expected at least one row below the header, found none")
    if "split" in found:
        found["split"] = _splits(path, found["split"])
    found = _each_once(path, roles, found)
    return LabelsTable(path, roles["target"], found["key"], found["target"], found.get("split"), found.get("group"))


def find_labels(labels: str | Path | LabelsTable | None, target: str | None, key: str | None) -> LabelsTable | None:
    """Return the table that a stage was asked to take labels from; see `read_labels`."""
    if not isinstance(labels, str | Path) and (target, key) != (None, None):
        raise TableError(f"{'target' if target else 'key'} names a column of a table; also name that table (labels)")
    return read_labels(labels, target, key) if isinstance(labels, str | Path) else labels


def _roles(path: Path, header: Sequence[str], target: str | None, key: str | None) -> dict[str, str]:
    """Return which column is the key, the target, the split and the group."""
    by_word = {name.lower(): name for name in header}
    named = _some(header, len(header))
    for asked in (target, key):
        if asked is not None and asked not in header:
            raise TableError(f"{path} has no column {asked!r}, but {named}{nearest(asked, header)}")
    found_key = key or next((by_word[word] for word in KEYS if by_word.get(word, target) != target), None)
    if found_key is None:
        raise TableError(f"{path}: say which column names the images (key): {named}")
    roles = {"key": found_key}
    roles |= {word: by_word[word] for word in ("split", "group") if word in by_word and by_word[word] != target}
    others = [name for name in header if name not in roles.values()]
    label = next((name for name in others if name.lower() == TARGET), None)
    found_target = target or label or (others[0] if len(others) == 1 else None)
    if found_target == found_key:
        raise TableError(f"{path}: column {found_key!r} cannot be both key and target")
    if found_target is None:
        raise TableError(f"{path}: say which column holds the labels (target): {_some(others, len(others)) or 'none'}")
    return roles | {"target": found_target}


def _splits(path: Path, words: list[str]) -> list[str]:
    meanings = {word: SPLIT_WORDS.get(word.lower(), None if word else "") for word in dict.fromkeys(words)}
    for word, meaning in meanings.items():
        if meaning is None:
            raise TableError(f"{path}: expected split train, val, test or none, found {word!r}")
    return [*map({word: meaning or "" for word, meaning in meanings.items()}.__getitem__, words)]


def _each_once(path: Path, roles: dict[str, str], found: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return the columns with each key once; rows of one key must say the same."""
    keys = found["key"]
    different = set(keys)
    if "" in different:
        raise TableError(f"{path}: expected the name of an image in column {roles['key']!r} of each row, found none")
    if len(different) == len(keys):
        return found
    last = {key: number for number, key in enumerate(keys)}
    for number, key in enumerate(keys):
        for role, column in found.items():
            if column[number] != column[last[key]]:
                raise TableError(
                    f"{path} names {key!r} twice, with {roles[role]} {column[number]!r} and {column[last[key]]!r}; "
                    "keep the right row"
                )
    return {role: [column[number] for number in last.values()] for role, column in found.items()}


def _odd(classes: Sequence[str], target: str) -> Iterator[str]:
    """Name classes that look like a missing label, or like numbers among words."""
    for name in classes:
        if name.lower() in _NOT_GIVEN:
            yield f"'{name}' in column '{target}' counts as a class; leave the cell empty if it stands for no label"
    kinds = Counter(_is_number(name) for name in classes)
    if len(kinds) > 1:
        words = [name for name in classes if not _is_number(name)]
        yield f"column '{target}' mixes numbers with text, each of them a class: {_some(words, len(words))}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


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


def _some(names: Sequence[str] | StrArray, count: int) -> str:
    shown = ", ".join(str(name) for name in names[:MOST_NAMED])
    return f"{shown} and {count - MOST_NAMED} more" if count > MOST_NAMED else shown
