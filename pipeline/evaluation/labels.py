"""Labels that a table gives to the images of a cache, joined by the names of the images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray

from features_cache import nearest
from pipeline.arrays import IntArray, StrArray
from pipeline.errors import TableError
from pipeline.evaluation.leaks import MOST_NAMED
from pipeline.evaluation.targets import BAR, read_answers, some
from pipeline.options import CLASSIFICATION, MULTILABEL
from pipeline.spec import fingerprint_of
from pipeline.tables import SPLIT_WORDS, read_columns, row_number

KEYS = ("uri", "path", "file", "filename", "file_name", "image", "image_id", "id")
"""Columns that name the images, unless the user says which one does; the first of these counts."""
TARGET = "label"
"""The column that holds the labels, unless the user says which one does."""

_CHUNK = 1 << 16
_MISSING, _AMBIGUOUS = -1, -2
_YES_OR_NO = dict.fromkeys(("1", "1.0", "true", "yes"), True) | dict.fromkeys(("0", "0.0", "false", "no"), False)


@dataclass(frozen=True, eq=False)
class RowLabels:
    """What is known of n rows; columns of length n.

    Parameters
    ----------
    classes, labels, values
        See `pipeline.evaluation.targets.Answers`.
    splits, groups : (n,) str
    notes : tuple of str
        What a user should know about where these came from.
    """

    classes: tuple[str, ...]
    labels: IntArray
    splits: StrArray
    groups: StrArray
    notes: tuple[str, ...] = ()
    values: NDArray[Any] | None = None


def labels_of(
    classes: Sequence[str], labels: IntArray, splits: StrArray, groups: StrArray, task: str = CLASSIFICATION
) -> RowLabels:
    """Return what a source itself says of its images; raises `TableError` if that fits no such task."""
    if task == CLASSIFICATION:
        return RowLabels(tuple(classes), labels, splits, groups)
    found = read_answers(task, np.array([*classes, ""])[labels].tolist(), "the label of the source")
    return RowLabels(found.classes, found.labels, splits, groups, found.notes, found.values)


@dataclass(frozen=True, eq=False)
class LabelsTable:
    """A table that says what is to be predicted of each image that it names; keys are unique.

    Parameters
    ----------
    path : Path
    target : str
        Name of the column of labels, or the names of several.
    keys, labels : list of str
        Cells as `pipeline.evaluation.targets.read_answers` takes them; ``""`` is no label.
    splits, groups : list of str, optional
        None where the table has no such column.
    task : str, default "classification"
        One of `pipeline.options.TASKS`.
    columns : tuple of str, optional
        The names of several columns of 0 and 1, each of them a label.
    """

    path: Path
    target: str
    keys: list[str]
    labels: list[str]
    splits: list[str] | None
    groups: list[str] | None
    task: str = CLASSIFICATION
    columns: tuple[str, ...] = ()

    @cached_property
    def digest(self) -> str:
        """Digest of all that the labels of a cache's rows depend on; the table's name does not count."""
        told = [self.target, self.keys, self.labels, self.splits, self.groups]
        return fingerprint_of(told if self.task == CLASSIFICATION else [self.task, self.columns, *told])

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
        answers = read_answers(self.task, cells, f"column '{self.target}' of {self.path.name}", self.columns)
        labels = np.full(len(uris), -1)
        labels[labelled] = answers.labels
        values = None
        if answers.values is not None:
            values = np.zeros((len(uris), *answers.values.shape[1:]), answers.values.dtype)
            values[labelled] = answers.values
        own = {"split": self.splits, "group": self.groups}
        columns = {"split": splits, "group": groups}
        for name, column in own.items():
            if column is not None:
                columns[name] = np.full(len(uris), "", object)
                columns[name][labelled] = [column[one] for one in found[labelled].tolist()]
                columns[name] = columns[name].astype(np.str_)
        joined = self._joined(way, [name for name, column in own.items() if column is not None])
        notes = (joined, *self._left_out(uris, found, labels, way), *answers.notes)
        return RowLabels(answers.classes, labels, columns["split"], columns["group"], notes, values)

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
                yield f"{int(rows.sum())} of {len(uris)} {what}: {some(uris[rows][:MOST_NAMED], int(rows.sum()))}"
        unused = np.ones(len(self.keys), bool)
        unused[found[found >= 0]] = False
        if (count := int(unused.sum())) and not (found == _AMBIGUOUS).any():
            first = [self.keys[number] for number in np.flatnonzero(unused)[:MOST_NAMED].tolist()]
            yield f"{count} of {len(self.keys)} keys of {self.path.name} fit no image: {some(first, count)}"


def read_labels(
    path: str | Path, target: str | Sequence[str] | None = None, key: str | None = None, task: str = CLASSIFICATION
) -> LabelsTable:
    """Read a table that says what is to be predicted, with splits and groups where it has columns of these names.

    Parameters
    ----------
    path : str or Path
        See `pipeline.tables.read_columns`.
    target : str or sequence of str, optional
        The column of labels: by default ``label``, or else the only column that is neither key, split nor group.
        Several columns of 0 and 1 are a label each, for the task ``"multilabel"``.
    key : str, optional
        The column that names images: by default the first that is called as one of `KEYS`.
    task : str, default "classification"
        One of `pipeline.options.TASKS`.

    Raises
    ------
    TableError
        If a column is missing, a split is unknown, or an image is named twice with different labels.
    """
    path = Path(path)
    targets = tuple(dict.fromkeys((target,) if isinstance(target, str) else target or ()))
    if len(targets) > 1 and task != MULTILABEL:
        raise TableError(f"{path}: several columns are labels of task '{MULTILABEL}'; name one of {some(targets, 1)}")
    roles: dict[str, str] = {}

    def choose(header: Sequence[str]) -> list[str]:
        roles.update(_roles(path, header, targets, key))
        return list(dict.fromkeys([*roles.values(), *targets]))

    columns = read_columns(path, choose)
    found = {role: columns[name] for role, name in roles.items()}
    if not found["key"]:
        raise TableError(f"{path}: expected at least one row below the header, found none")
    if "split" in found:
        found["split"] = _splits(path, found["split"])
    if len(targets) > 1:
        roles["target"], found["target"] = ", ".join(targets), _label_sets(path, targets, columns)
    found = _each_once(path, roles, found)
    return LabelsTable(
        path,
        roles["target"],
        found["key"],
        found["target"],
        found.get("split"),
        found.get("group"),
        task,
        tuple(normalize("NFC", name) for name in targets) if len(targets) > 1 else (),
    )


def find_labels(
    labels: str | Path | LabelsTable | None,
    target: str | Sequence[str] | None,
    key: str | None,
    task: str = CLASSIFICATION,
) -> LabelsTable | None:
    """Return the table that a stage was asked to take labels from; see `read_labels`."""
    if isinstance(labels, LabelsTable) and labels.task != task:
        raise TableError(f"{labels.path} was read for task '{labels.task}'; read it for task '{task}'")
    if not isinstance(labels, str | Path) and (target or key):
        raise TableError(f"{'target' if target else 'key'} names a column of a table; also name that table (labels)")
    return read_labels(labels, target, key, task) if isinstance(labels, str | Path) else labels


def _roles(path: Path, header: Sequence[str], targets: Sequence[str], key: str | None) -> dict[str, str]:
    """Return which column is the key, the (first) target, the split and the group."""
    by_word = {name.lower(): name for name in header}
    named = some(header, len(header))
    for asked in (*targets, key):
        if asked is not None and asked not in header:
            raise TableError(f"{path} has no column {asked!r}, but {named}{nearest(asked, header)}")
    free = {word: name for word, name in by_word.items() if name not in targets}
    found_key = key or next((free[word] for word in KEYS if word in free), None)
    if found_key is None:
        raise TableError(f"{path}: say which column names the images (key): {named}")
    if found_key in targets:
        raise TableError(f"{path}: column {found_key!r} cannot be both key and target")
    roles = {"key": found_key} | {word: free[word] for word in ("split", "group") if word in free}
    others = [name for name in header if name not in roles.values()]
    label = next((name for name in others if name.lower() == TARGET), None)
    found = targets[0] if targets else label or (others[0] if len(others) == 1 else None)
    if found is None:
        raise TableError(f"{path}: say which column holds the labels (target): {some(others, len(others)) or 'none'}")
    return roles | {"target": found}


def _label_sets(path: Path, names: Sequence[str], columns: dict[str, list[str]]) -> list[str]:
    """Return cells of labels for columns that say of each label whether an image has it; empty if one does not say."""
    for name in names:
        if BAR in name:
            raise TableError(f"{path}: column {name!r} cannot be a label, because bars stand between labels; rename it")
    cells = []
    for number, row in enumerate(zip(*(columns[name] for name in names), strict=True)):
        found = [_YES_OR_NO.get(cell.lower()) for cell in row]
        for name, cell, has in zip(names, row, found, strict=True):
            if cell and has is None:
                raise TableError(
                    f"{path}: expected 0 or 1 (no or yes, false or true) in column {name!r}, found {cell!r} in row "
                    f"{row_number(path, number)}"
                )
        own = [name for name, has in zip(names, found, strict=True) if has]
        cells.append("" if None in found else BAR.join(own) or BAR)
    return cells


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
