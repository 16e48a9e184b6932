"""Labels that a table gives to the images of a cache, joined by the names of the images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray

from pipeline.arrays import IntArray, StrArray
from pipeline.errors import TableError
from pipeline.evaluation.joined import JoinedColumns, join_columns
from pipeline.evaluation.keyed import KeyedTable, each_once, key_column, require_columns
from pipeline.evaluation.targets import BAR, read_answers, some
from pipeline.options import CLASSIFICATION, MULTILABEL
from pipeline.spec import fingerprint_of
from pipeline.tables import SPLIT_WORDS, read_columns, row_number

TARGET = "label"
"""The column that holds the labels, unless the user says which one does."""

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
    joined : JoinedColumns, optional
        Of rows with a label; other rows hold nothing of meaning.
    """

    classes: tuple[str, ...]
    labels: IntArray
    splits: StrArray
    groups: StrArray
    notes: tuple[str, ...] = ()
    values: NDArray[Any] | None = None
    joined: JoinedColumns | None = None


def labels_of(
    table: LabelsTable | None,
    uris: StrArray,
    classes: Sequence[str],
    labels: IntArray,
    splits: StrArray,
    groups: StrArray,
    task: str = CLASSIFICATION,
) -> RowLabels:
    """Return what a table, or else the source itself, says of images; raises `TableError` if that fits no such task."""
    if table is not None:
        return table.join(uris, splits, groups)
    if task == CLASSIFICATION:
        return RowLabels(tuple(classes), labels, splits, groups)
    found = read_answers(task, np.array([*classes, ""])[labels].tolist(), "the label of the source")
    return RowLabels(found.classes, found.labels, splits, groups, found.notes, found.values)


@dataclass(frozen=True, eq=False)
class LabelsTable(KeyedTable):
    """A table that says what is to be predicted of each image that it names.

    Parameters
    ----------
    path, keys, joined
        See `pipeline.evaluation.keyed.KeyedTable`.
    target : str
        Name of the column of labels, or the names of several.
    labels : list of str
        Cells as `pipeline.evaluation.targets.read_answers` takes them; ``""`` is no label.
    splits, groups : list of str, optional
        None where the table has no such column.
    task : str, default "classification"
        One of `pipeline.options.TASKS`.
    columns : tuple of str, optional
        The names of several columns of 0 and 1, each of them a label.
    """

    target: str
    labels: list[str]
    splits: list[str] | None
    groups: list[str] | None
    task: str = CLASSIFICATION
    columns: tuple[str, ...] = ()

    @cached_property
    def digest(self) -> str:
        """Digest of all that the labels of a cache's rows depend on; the table's name does not count."""
        told: list[Any] = [self.target, self.keys, self.labels, self.splits, self.groups]
        told = told if self.task == CLASSIFICATION else [self.task, self.columns, *told]
        return fingerprint_of([*told, self.joined] if self.joined else told)

    def join(self, uris: StrArray, splits: StrArray, groups: StrArray) -> RowLabels:
        """Give labels to rows, and the joined columns; a row with an empty cell in one of these gets no label.

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
        way, found = self.find(uris)
        incomplete = self.incomplete(found)
        labelled = (found >= 0) & ~incomplete
        if not labelled.any() and incomplete.any():
            raise TableError(f"{self.path}: all images of this source have an empty cell in {', '.join(self.joined)}")
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
                columns[name] = np.where(labelled, np.array(column)[np.maximum(found, 0)], "")
        joined = self._joined(way, [name for name, column in own.items() if column is not None])
        without = {f"images have no label in {self.path.name}": labelled & (labels < 0)}
        notes = (joined, *self.left_out(uris, found, way, without), *answers.notes)
        table_columns = join_columns(self, found, labels >= 0) if self.joined else None
        return RowLabels(answers.classes, labels, columns["split"], columns["group"], notes, values, table_columns)

    def _joined(self, way: str, also: Sequence[str]) -> str:
        given = f", and so do {' and '.join(f'{name}s' for name in also)}" if also else ""
        return f"labels come from column '{self.target}' of {self.path.name}, joined by {way}{given}"


def read_labels(
    path: str | Path,
    target: str | Sequence[str] | None = None,
    key: str | None = None,
    task: str = CLASSIFICATION,
    columns: Sequence[str] = (),
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
    columns : sequence of str, optional
        Columns to join to features.

    Raises
    ------
    TableError
        If a column is missing, or is to be joined and is the key, the target, the split or the group; if a
        split is unknown, or an image is named twice with different labels.
    """
    path, columns = Path(path), tuple(dict.fromkeys(columns))
    targets = tuple(dict.fromkeys((target,) if isinstance(target, str) else target or ()))
    if len(targets) > 1 and task != MULTILABEL:
        raise TableError(f"{path}: several columns are labels of task '{MULTILABEL}'; name one of {some(targets, 1)}")
    roles: dict[str, str] = {}

    def choose(header: Sequence[str]) -> list[str]:
        roles.update(_roles(path, header, targets, key, columns))
        return list(dict.fromkeys([*roles.values(), *targets, *columns]))

    found = read_columns(path, choose)
    if "split" in roles:
        found[roles["split"]] = _splits(path, found[roles["split"]])
    if len(targets) > 1:
        roles["target"] = ", ".join(targets)
        found[roles["target"]] = _label_sets(path, targets, found)
    found = each_once(path, roles["key"], {name: found[name] for name in (*roles.values(), *columns)})
    return LabelsTable(
        path,
        found[roles["key"]],
        {name: found[name] for name in columns},
        roles["target"],
        found[roles["target"]],
        found[roles["split"]] if "split" in roles else None,
        found[roles["group"]] if "group" in roles else None,
        task,
        tuple(normalize("NFC", name).strip() for name in targets) if len(targets) > 1 else (),
    )


def find_labels(
    labels: str | Path | LabelsTable | None,
    target: str | Sequence[str] | None,
    key: str | None,
    task: str = CLASSIFICATION,
    columns: Sequence[str] | None = None,
) -> LabelsTable | None:
    """Return the table that a stage was asked to take labels from; see `read_labels`."""
    if isinstance(labels, LabelsTable) and labels.task != task:
        raise TableError(f"{labels.path} was read for task '{labels.task}'; read it for task '{task}'")
    if isinstance(labels, LabelsTable) and labels.joined:
        raise TableError(f"{labels.path} was read with columns to join; give fit its path and the columns")
    named = {"target": target, "key": key, "with": columns}
    if not isinstance(labels, str | Path) and (given := next((name for name, one in named.items() if one), None)):
        what = "columns to join (with) are" if given == "with" else f"{given} is a column"
        raise TableError(f"{what} of a table; also name that table (labels)")
    return read_labels(labels, target, key, task, columns or ()) if isinstance(labels, str | Path) else labels


def _roles(
    path: Path, header: Sequence[str], targets: Sequence[str], key: str | None, joined: Sequence[str]
) -> dict[str, str]:
    """Return which column is the key, the (first) target, the split and the group."""
    require_columns(path, header, [*targets, *([] if key is None else [key]), *joined])
    free = {name.lower(): name for name in header if name not in targets}
    found_key = key_column(path, header, key, targets)
    if found_key in targets:
        raise TableError(f"{path}: column {found_key!r} cannot be both key and target")
    roles = {"key": found_key} | {word: free[word] for word in ("split", "group") if word in free}
    others = [name for name in header if name not in (*roles.values(), *joined)]
    label = next((name for name in others if name.lower() == TARGET), None)
    found = targets[0] if targets else label or (others[0] if len(others) == 1 else None)
    if found is None:
        raise TableError(f"{path}: say which column holds the labels (target): {some(others, len(others)) or 'none'}")
    roles["target"] = found
    for role, name in [*roles.items(), *(("target", name) for name in targets)]:
        if name in joined:
            raise TableError(f"{path}: column {name!r} is the {role} and cannot also be joined to the features")
    return roles


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
