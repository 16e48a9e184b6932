"""What is predicted of images: a class, several labels, or a number, as read from cells of text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray

from features_cache import nearest
from pipeline.arrays import BoolArray, Float64Array, IntArray
from pipeline.errors import FitError, TableError
from pipeline.evaluation.leaks import MOST_NAMED
from pipeline.options import CLASSIFICATION, METRICS_OF, MULTILABEL, REGRESSION, TASK, check_options

BAR = "|"
"""Between the labels of a cell. A bar alone says that an image has none of them."""
MOST_STRATA = 10
"""Ranges of a number that splits spread evenly."""
LEAST_RANGE = 1e-5
"""Of numbers, as a share of the largest: heads and networks compute in float32, which cannot tell smaller ones."""

LARGEST = 1e30
"""Number; the square of a larger one may be beyond float32 or float64."""

_NOT_GIVEN = ("nan", "na", "n/a", "null", "none")


class Answers(NamedTuple):
    """What is to be predicted of n rows.

    Attributes
    ----------
    classes : tuple of str
        Names of the classes or labels; empty for numbers.
    labels : (n,) int64
        Class numbers. For other tasks, what splits are stratified by: the number of the rarest label that a row has, or
        a range of the numbers. -1 for rows without an answer.
    values : (n, K) bool, (n,) float64 or None
        Which labels a row has, or its number; None for classes.
    notes : tuple of str
        What a user should know about the cells.
    """

    classes: tuple[str, ...]
    labels: IntArray
    values: NDArray[Any] | None = None
    notes: tuple[str, ...] = ()


def check_task(task: str, metric: str | None, **of_classes: Any) -> str:
    """Return the metric to choose by.

    Raises
    ------
    FitError
        If there is no such task, no such metric of it, or one of the options `of_classes` is given for another task.
    """
    check_options([TASK], {"task": task})
    known = METRICS_OF[task]
    if metric is not None and metric not in known:
        raise FitError(
            f"expected a metric for {task}, one of {', '.join(known)}; got {metric!r}{nearest(metric, known)}"
        )
    for name, given in of_classes.items():
        if given and task != CLASSIFICATION:
            raise FitError(f"{name} is only for classes; leave it out for {task}")
    return metric or known[0]


def read_answers(task: str, cells: Sequence[str], where: str, columns: Sequence[str] = ()) -> Answers:
    """Return what the cells of a column say; an empty cell says nothing.

    Parameters
    ----------
    task : str
        One of `pipeline.options.TASKS`.
    cells : sequence of str
        A class, labels with bars between them, or a number each.
    where : str
        Names the column in messages.
    columns : sequence of str, optional
        All labels, if each was a column of its own.

    Raises
    ------
    TableError
        If no cell says anything, or the cells do not fit the task.

    Examples
    --------
    >>> found = read_answers("multilabel", ["cat|dog", "dog", "|", ""], "column 'pets'")
    >>> found.classes, found.values.astype(int).tolist(), found.labels.tolist()
    (('cat', 'dog'), [[1, 1], [0, 1], [0, 0], [0, 0]], [0, 1, 2, -1])
    """
    if not any(cells):
        raise TableError(f"{where} is empty for all images of this source")
    if task == REGRESSION:
        return _read_numbers(cells, where)
    return _read_label_sets(cells, where, columns) if task == MULTILABEL else _read_classes(cells, where)


def _read_classes(cells: Sequence[str], where: str) -> Answers:
    names = {cell: normalize("NFC", cell) for cell in dict.fromkeys(cells)}
    classes = tuple(sorted(set(names.values()) - {""}))
    numbers = {name: number for number, name in enumerate(classes)} | {"": -1}
    codes = {cell: numbers[name] for cell, name in names.items()}
    labels = np.fromiter(map(codes.__getitem__, cells), np.int64, len(cells))
    return Answers(classes, labels, notes=tuple(_odd(classes, labels, where)))


def _odd(classes: Sequence[str], labels: IntArray, where: str) -> Iterator[str]:
    """Name classes that look like a missing label, like numbers among words, or like another task."""
    yield from _not_given(classes, where, "class")
    kinds = Counter(finite_number(name) is not None for name in classes)
    if len(kinds) > 1:
        words = [name for name in classes if finite_number(name) is None]
        yield f"{where} mixes numbers with text, each of them a class: {some(words, len(words))}"
    elif kinds[True] and len(classes) > max(MOST_STRATA, int((labels >= 0).sum()) // MOST_STRATA):
        told = f"{where} holds {len(classes)} different numbers, each of them a class"
        yield f"{told}; if they are measurements, use task 'regression'"
    if several := sum(BAR in name for name in classes):
        yield f"{several} classes in {where} hold a bar; task 'multilabel' takes them for several labels of an image"


def _not_given(names: Sequence[str], where: str, kind: str) -> Iterator[str]:
    for name in names:
        if name.lower() in _NOT_GIVEN:
            yield f"'{name}' in {where} counts as a {kind}; leave the cell empty if it stands for no label"


def _read_label_sets(cells: Sequence[str], where: str, columns: Sequence[str]) -> Answers:
    parsed = {
        cell: [name for part in normalize("NFC", cell).split(BAR) if (name := part.strip())]
        for cell in dict.fromkeys(cells)
    }
    names = tuple(columns) or tuple(sorted({name for found in parsed.values() for name in found}))
    number = {name: index for index, name in enumerate(names)}
    values = np.zeros((len(cells), len(names)), bool)
    for row, cell in enumerate(cells):
        values[row, [number[name] for name in parsed[cell]]] = True
    answered = np.array([bool(cell) for cell in cells])
    counts = values.sum(axis=0)
    kept = (counts > 0) & (counts < answered.sum())
    if kept.sum() < 2:
        raise TableError(
            f"{where}: expected at least two labels that some images have and others lack, found {int(kept.sum())}; "
            "for one label use task 'classification'"
        )
    notes = _same_everywhere([names[index] for index in np.flatnonzero(~kept)], where)
    values, names = values[:, kept], tuple(name for name, is_kept in zip(names, kept.tolist(), strict=True) if is_kept)
    labels = np.where(answered, _rarest(values), -1)
    return Answers(names, labels, values, (*notes, *_not_given(names, where, "label")))


def _same_everywhere(names: Sequence[str], where: str) -> Iterator[str]:
    if names:
        yield f"{where}: labels that every image or no image has are left out: {some(names, len(names))}"


def _rarest(values: BoolArray) -> IntArray:
    """Return the rarest label (n,) of each row of `values` (n, K), K for a row without labels.

    Splits that spread these evenly also spread the labels evenly, the rarest ones best. Sechidis et al. (2011) take
    labels in the same order, but one after another.
    """
    order = np.argsort(values.sum(axis=0), kind="stable")
    return np.asarray(np.where(values.any(axis=1), order[values[:, order].argmax(axis=1)], values.shape[1]))


def _read_numbers(cells: Sequence[str], where: str) -> Answers:
    known = {cell: finite_number(cell) if cell else math.nan for cell in dict.fromkeys(cells)}
    for cell, number in known.items():
        if number is None:
            raise TableError(
                f"{where}: expected a number, or an empty cell for an image without one, found {cell!r}; "
                "for classes use task 'classification'"
            )
        if abs(number) > LARGEST:
            raise TableError(f"{where}: expected numbers up to {LARGEST:.0e}, found {cell!r}; use a larger unit")
    values = np.array([known[cell] for cell in cells], np.float64)
    answered = np.isfinite(values)
    require_spread(values[answered], where, "there is nothing to predict")
    labels = np.full(len(values), -1)
    labels[answered] = _ranges(values[answered])
    return Answers((), labels, values)


def require_spread(values: Float64Array, where: str, so: str) -> None:
    """Raise `TableError` if numbers (n,) are all the same, `so` saying what follows, or differ by too little."""
    extent, largest = np.ptp(values), np.abs(values).max()
    if extent == 0:
        raise TableError(f"{where} is {values[0]:g} for all images, so {so}")
    if extent < LEAST_RANGE * largest:
        raise TableError(
            f"{where}: the numbers differ by {extent:.3g} at most, which is too little beside {largest:.3g}; "
            "subtract a constant, such as the smallest"
        )


def _ranges(values: Float64Array) -> IntArray:
    """Number ranges of equally many values (n,), at most `MOST_STRATA`."""
    count = max(2, min(MOST_STRATA, len(values) // MOST_STRATA))
    ranks = np.empty(len(values), np.int64)
    ranks[np.argsort(values, kind="stable")] = np.arange(len(values))
    return ranks * count // len(values)


def finite_number(text: str) -> float | None:
    """Return the finite number that a text is; None if it is none.

    Python would also take ``1_2`` for 12, and digits of other scripts.
    """
    if "_" in text or not text.isascii():
        return None
    try:
        found = float(text)
    except ValueError:
        return None
    return found if math.isfinite(found) else None


def some(names: Sequence[str], count: int) -> str:
    """Return the first of `count` names, and how many more there are."""
    shown = ", ".join(str(name) for name in names[:MOST_NAMED])
    return f"{shown} and {count - MOST_NAMED} more" if count > MOST_NAMED else shown
