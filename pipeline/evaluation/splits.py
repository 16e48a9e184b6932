"""Which rows train, which choose, which judge: given splits are used, missing ones are cut.

What is cut is stratified by class and drawn by a seed: 20 % of each class for test, 20 % of the rest for val. Rows of
one group, and rows of equal bytes, stay on one side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import FitError
from pipeline.evaluation.leaks import MOST_NAMED, find_leaks, join_units, tell_groups, tell_leaks

Ints = NDArray[np.int64]
Strings = NDArray[np.str_]

HELD_OUT = 0.2


@dataclass(frozen=True)
class Splits:
    """Row numbers of each part, sorted, and what a user should know about them.

    Parameters
    ----------
    train, val, test : (n,) int64
        `val` is empty where C is chosen by folds inside train (few shots, or classes too small to cut a val from).
    notes : list of str
        One sentence each.
    leaks : list of (int, int)
        Row of test (or val) that repeats the bytes of a row of train or val (or train): ``(repeated, original)``.
    """

    train: Ints
    val: Ints
    test: Ints
    notes: list[str]
    leaks: list[tuple[int, int]]


def make_splits(
    labels: Ints,
    given: Strings,
    groups: Strings,
    digests: NDArray[np.uint8],
    seed: int,
    shots: int | str = "all",
    classes: Sequence[str] = (),
    uris: Sequence[str] = (),
) -> Splits:
    """Sort labelled rows into train, val and test.

    Parameters
    ----------
    labels : (n,) int64
        Class numbers; rows of label -1 are left out.
    given : (n,) str
        ``"train"``, ``"val"``, ``"test"`` or ``""``; where any row has a split, rows without one are training rows.
    groups : (n,) str
        Rows of one group stay together; ``""`` is no group.
    digests : (n, 16) uint8
        Digests of the images' bytes; equal ones stay together.
    seed : int
        Draws the cuts and the shots.
    shots : int or "all", default "all"
        How many training rows of each class to keep; val is then empty and the given one is not used.
    classes, uris : sequences of str, optional
        Names of classes and rows, for the notes.

    Raises
    ------
    FitError
        If a part that a fit needs would be empty, or fewer than two classes are left to train on.
    """
    rows = np.flatnonzero(labels >= 0)
    if not len(rows):
        raise FitError("fitting needs labelled rows, but no row has a label; put the images into a folder per class")
    units = join_units(groups, digests)
    rng = np.random.default_rng(seed)
    notes: list[str] = []
    train, val, test = _assign(rows, labels, given, units, rng, notes, cut_val=shots == "all")
    if shots != "all":
        train = _draw(train, labels, int(shots), rng, notes, classes)
        val = val[:0]
    _require(train, val, test, labels, notes, classes)
    leaks = find_leaks(train, val, test, digests)
    notes += tell_leaks(leaks, test, uris) + tell_groups(train, val, test, groups)
    return Splits(train, val, test, notes, leaks)


def stratified_folds(labels: Ints, count: int, seed: int) -> list[tuple[Ints, Ints]]:
    """Cut rows into folds, each class spread evenly over them.

    Parameters
    ----------
    labels : (n,) int64
        Class numbers.
    count : int
        Number of folds wanted. Fewer come back where leaving a fold out would leave a single class.
    seed : int
        Draws the folds.

    Returns
    -------
    list of (train, held)
        Sorted positions in `labels`.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # class after class, so that consecutive rows part
    fold = np.empty(len(labels), np.int64)
    fold[order] = np.arange(len(labels)) % count
    pairs = [(np.flatnonzero(fold != number), np.flatnonzero(fold == number)) for number in range(count)]
    return [(rest, held) for rest, held in pairs if len(held) and len(np.unique(labels[rest])) > 1]


def _assign(
    rows: Ints, labels: Ints, given: Strings, units: Ints, rng: np.random.Generator, notes: list[str], cut_val: bool
) -> tuple[Ints, Ints, Ints]:
    parts = {name: rows[given[rows] == name] for name in ("train", "val", "test", "")}
    train, val, test, free = parts.values()
    if free.size and free.size < rows.size:
        notes.append(f"{free.size} rows have no split while others have one: they are used for training")
    train = np.sort(np.concatenate([train, free]))
    if not train.size:
        raise FitError("fitting needs training rows, but every labelled row is given as val or test; add a train split")
    if not test.size:
        notes.append("no test split given: 20 % of the training rows of each class were drawn as test set, by seed")
        count = train.size
        train, test = _cut(train, labels, units, rng)
        if not test.size or not train.size:
            raise FitError(
                f"no test set can be cut from {count} training rows: at least one class needs 3 images "
                "that are not of one group; add images, or give a test split"
            )
    if not val.size and cut_val:
        train, val = _cut(train, labels, units, rng)
        notes.append(
            "no val split given: 20 % of the training rows of each class were drawn as val set, by seed"
            if val.size
            else "too few training rows for a val set: parameters are chosen by folds inside train"
        )
    return train, val, test


def _cut(rows: Ints, labels: Ints, units: Ints, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Hold out a share of each class, whole units only: the big ones first, single rows fill what is missing."""
    rows = rng.permutation(rows)
    _, unit, sizes = np.unique(units[rows], return_inverse=True, return_counts=True)
    if len(sizes) == 1:
        return np.sort(rows), rows[:0]
    n_classes = int(labels[rows].max()) + 1
    missing = np.floor(HELD_OUT * np.bincount(labels[rows], minlength=n_classes) + 0.5).astype(np.int64)
    held = np.zeros(len(rows), bool)
    grouped = np.flatnonzero(sizes[unit] > 1)
    grouped = grouped[np.argsort(unit[grouped], kind="stable")]
    sets = np.split(grouped, np.flatnonzero(np.diff(unit[grouped])) + 1) if grouped.size else []
    sets = [sets[i] for i in rng.permutation(len(sets))]
    for members in sorted(sets, key=len, reverse=True):
        after = missing - np.bincount(labels[rows[members]], minlength=n_classes)
        if np.abs(after).sum() < np.abs(missing).sum():
            held[members] = True
            missing = after
    singles = np.flatnonzero(sizes[unit] == 1)
    held[singles[_rank_in_class(labels[rows[singles]]) < missing[labels[rows[singles]]]]] = True
    if not held.any() and sets and missing.any():
        held[min(sets, key=len)] = True  # every unit is larger than its share: the smallest is the least bad
    return np.sort(rows[~held]), np.sort(rows[held])


def _rank_in_class(labels: Ints) -> Ints:
    """Return for each position how many earlier ones have the same label."""
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], labels[order])
    rank = np.empty(len(labels), np.int64)
    rank[order] = np.arange(len(labels)) - starts
    return rank


def _draw(
    train: Ints, labels: Ints, shots: int, rng: np.random.Generator, notes: list[str], classes: Sequence[str]
) -> Ints:
    shuffled = rng.permutation(train)
    kept = np.sort(shuffled[_rank_in_class(labels[shuffled]) < shots])
    found, counts = np.unique(labels[kept], return_counts=True)
    if (counts < shots).any():
        notes.append(f"fewer than {shots} training rows: {_names(found[counts < shots], classes)}")
    return kept


def _require(train: Ints, val: Ints, test: Ints, labels: Ints, notes: list[str], classes: Sequence[str]) -> None:
    learnt = np.unique(labels[train])
    if len(learnt) < 2:
        raise FitError(
            f"fitting needs at least two classes among the training rows, found only {_names(learnt, classes)}"
        )
    unseen = np.setdiff1d(labels[test], labels[np.concatenate([train, val])])
    if unseen.size:
        notes.append(f"without a training row, so that each test row counts as an error: {_names(unseen, classes)}")
    for name, part in (("val", val), ("test", test)):
        absent = np.setdiff1d(learnt, labels[part])
        if part.size and absent.size:
            notes.append(f"without a row in {name}: {_names(absent, classes)}")


def _names(numbers: Ints, classes: Sequence[str]) -> str:
    names = [classes[i] if i < len(classes) else str(i) for i in numbers[:MOST_NAMED]]
    rest = len(numbers) - len(names)
    return f"class{'es' if len(numbers) > 1 else ''} {', '.join(names)}" + (f" and {rest} more" if rest else "")
