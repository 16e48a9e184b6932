"""Which rows are train, val and test: given splits are used, missing ones are drawn.

They are stratified by class and drawn by a seed: 20 % of each class for test, 20 % of the rest for val. Rows of one
group, and rows of equal bytes, stay together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.arrays import IntArray, StrArray
from pipeline.errors import FitError
from pipeline.evaluation.leaks import (
    MOST_NAMED,
    NearDuplicates,
    find_leaks,
    group_notes,
    join_units,
    leak_notes,
)
from pipeline.options import SEED, SHOTS

HELD_OUT = 0.2
MISSED = "without a training row"
"""How the note on test rows of unknown classes begins."""


@dataclass(frozen=True)
class Splits:
    """Sorted row numbers of each part, and what a user should know about them.

    Parameters
    ----------
    train, val, test : (n,) int64
        `val` is empty if parameters are chosen on folds inside train (with shots, or if classes are too small).
    notes : list of str
        A sentence each.
    leaks : list of (int, int)
        Rows of test or val whose bytes equal those of an earlier part: ``(repeated, original)``.
    units : (all rows,) int64
        Rows of equal number are linked, by their group, their bytes or as near-duplicates.
    n_pool : int
        Number of rows that `train` and `val` were drawn from.
    """

    train: IntArray
    val: IntArray
    test: IntArray
    notes: list[str]
    leaks: list[tuple[int, int]]
    units: IntArray
    n_pool: int


def make_splits(
    labels: IntArray,
    given: StrArray,
    groups: StrArray,
    digests: NDArray[np.uint8],
    seed: int,
    shots: int | str = "all",
    classes: Sequence[str] = (),
    uris: Sequence[str] = (),
    *,
    drop_leaks: bool = False,
    near: NearDuplicates | None = None,
    values: NDArray[Any] | None = None,
) -> Splits:
    """Divide labelled rows into train, val and test.

    Parameters
    ----------
    labels : (n,) int64
        Class numbers, or what else to stratify by; rows of label -1 are left out.
    given : (n,) str
        ``"train"``, ``"val"``, ``"test"`` or ``""``; if any row has a split, rows without one are training rows.
    groups : (n,) str
        Rows of one group stay together; ``""`` is no group.
    digests : (n, 16) uint8
        Digests of the images' bytes; equal ones stay together.
    seed : int
        Draws what is not given, and the shots.
    shots : int or "all", default "all"
        How many training rows of each class to keep; val is then empty, and a given one is not used.
    classes, uris : sequences of str, optional
        Names of classes and rows for the notes.
    drop_leaks : bool, default False
        Leave out test rows whose bytes equal those of a training row (of any, whatever the shots).
    near : NearDuplicates, optional
        Keep groups of near-duplicates together where splits are drawn; with `drop_leaks`, also leave out test rows that
        are near a training row.
    values : (n, K) bool or (n,) float64, optional
        Which of several labels, whose names are `classes`, each row has, or its number, if `labels` are no classes.

    Raises
    ------
    FitError
        If train or test would be empty, or train has fewer than two classes or numbers.
    """
    rows = labelled_rows(labels)
    units = join_units(groups, digests, near)
    rng = np.random.default_rng(seed)
    notes: list[str] = []
    drawn = "20 % of the training rows of each class" if values is None else "20 % of the training rows"
    train, val, test = _assign(rows, labels, given, units, rng, notes, drawn, cut_val=shots == "all")
    if drop_leaks:
        test = _without_leaks(train, val, test, digests, near, notes)
    n_pool = len(train) + len(val)
    if shots != "all":
        n_pool = len(train)
        train = draw_shots(train, labels, int(shots), rng, notes, classes)
        val = val[:0]
    if values is None:
        notes += check_parts(train, val, test, labels, classes)
    else:
        notes += check_values(train, val, test, values, classes)
    leaks = find_leaks(train, val, test, digests)
    notes += leak_notes(leaks, test, uris) + group_notes(train, val, test, groups)
    return Splits(train, val, test, notes, leaks, units, n_pool)


def distinct_draws(seeds: Sequence[int], shots: Sequence[int | str]) -> tuple[list[int], list[int | str]]:
    """Return the seeds and shots without those that come twice, and numbers of numpy as Python's.

    Raises `FitError` if there is none, or one is not of the kind that the options take.
    """
    for name, values, option in (("seed", seeds, SEED), ("number of shots", shots, SHOTS)):
        if not len(values):
            raise FitError(f"expected at least one {name}, got none")
        for value in values:
            if problem := option.kind.problem(value):
                raise FitError(f"{name}: {problem}")
    numbers = [count if count == "all" else int(count) for count in shots]
    return list(dict.fromkeys(map(int, seeds))), list(dict.fromkeys(numbers))


def labelled_rows(labels: IntArray) -> IntArray:
    """Return the rows whose label is not -1; raise `FitError` if there is none."""
    rows = np.flatnonzero(labels >= 0)
    if not len(rows):
        raise FitError("no row has a label; put the images into one folder per class, or name a table of labels")
    return rows


def _assign(
    rows: IntArray,
    labels: IntArray,
    given: StrArray,
    units: IntArray,
    rng: np.random.Generator,
    notes: list[str],
    drawn: str,
    cut_val: bool,
) -> tuple[IntArray, IntArray, IntArray]:
    parts = {name: rows[given[rows] == name] for name in ("train", "val", "test", "")}
    train, val, test, free = parts.values()
    if free.size and free.size < rows.size:
        notes.append(f"{free.size} rows have no split while others have one; they are used for training")
    train = np.sort(np.concatenate([train, free]))
    if not train.size:
        raise FitError("every labelled row is given as val or test; add a train split")
    if not test.size:
        apart = train[~np.isin(units[train], units[val])]
        of_them = " that share no group or image with val" if apart.size < train.size else ""
        notes.append(f"no test split given: {drawn}{of_them} were drawn as test set, by seed")
        test = hold_out(apart, labels, units, rng)[1] if apart.size else apart
        train = np.setdiff1d(train, test)
        if not test.size or not train.size:
            raise FitError(
                f"cannot draw a test set from {apart.size} training rows{of_them}: it takes at least 3 images (of "
                "one class, if classes are predicted) that are not all in one group; add images, or give a test split"
            )
    if not val.size and cut_val:
        train, val = hold_out_val(train, labels, units, rng)
        notes.append(
            f"no val split given: {drawn} were drawn as val set, by seed"
            if val.size
            else "too few training rows (or groups) for a val set: parameters are chosen inside train"
        )
    return train, val, test


def _without_leaks(
    train: IntArray,
    val: IntArray,
    test: IntArray,
    digests: NDArray[np.uint8],
    near: NearDuplicates | None,
    notes: list[str],
) -> IntArray:
    in_test = set(test.tolist())
    leaking = [row for row, _ in find_leaks(train, val, test, digests) if row in in_test]
    repeat = "repeat"
    if near is not None:
        leaking = test[near.near_to(np.concatenate([train, val]))[test]].tolist()
        repeat = "repeat or nearly repeat"
    kept = np.setdiff1d(test, leaking)
    if not kept.size:
        raise FitError(f"all {test.size} test images {repeat} training images; give other test images")
    if leaking:
        notes.append(f"{len(leaking)} of {test.size} test images {repeat} training images and were left out")
    return kept


def hold_out(rows: IntArray, labels: IntArray, units: IntArray, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
    """Hold out `HELD_OUT` of each class in whole units: large ones first, then single rows for what is missing."""
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
        held[min(sets, key=len)] = True  # every unit is too large: the smallest does least harm
    return np.sort(rows[~held]), np.sort(rows[held])


def hold_out_val(
    train: IntArray, labels: IntArray, units: IntArray, rng: np.random.Generator
) -> tuple[IntArray, IntArray]:
    """Hold out a val set; none if it would leave a single class, or hold no class that is left to train on."""
    rest, val = hold_out(train, labels, units, rng)
    learnt = np.unique(labels[rest])
    return (rest, val) if len(learnt) > 1 and np.isin(labels[val], learnt).any() else (train, val[:0])


def _rank_in_class(labels: IntArray) -> IntArray:
    """Count for each row the earlier rows of the same label."""
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], labels[order])
    rank = np.empty(len(labels), np.int64)
    rank[order] = np.arange(len(labels)) - starts
    return rank


def draw_shots(
    train: IntArray, labels: IntArray, shots: int, rng: np.random.Generator, notes: list[str], classes: Sequence[str]
) -> IntArray:
    """Keep `shots` training rows of each class, or all it has."""
    shuffled = rng.permutation(train)
    kept = np.sort(shuffled[_rank_in_class(labels[shuffled]) < shots])
    found, counts = np.unique(labels[kept], return_counts=True)
    if (counts < shots).any():
        notes.append(f"fewer than {shots} training rows: {_names(found[counts < shots], classes)}")
    return kept


def check_parts(train: IntArray, val: IntArray, test: IntArray, labels: IntArray, classes: Sequence[str]) -> list[str]:
    """Refuse training rows of a single class; return notes on classes that a part lacks."""
    notes = []
    learnt = np.unique(labels[train])
    if len(learnt) < 2:
        raise FitError(f"expected at least two classes among the training rows, found only {_names(learnt, classes)}")
    unseen = np.setdiff1d(labels[test], labels[np.concatenate([train, val])])
    if unseen.size:
        notes.append(f"{MISSED}, so each of its test rows counts as an error: {_names(unseen, classes)}")
    for name, part in (("val", val), ("test", test)):
        absent = np.setdiff1d(learnt, labels[part])
        if part.size and absent.size:
            notes.append(f"without a row in {name}: {_names(absent, classes)}")
    return notes


def check_values(
    train: IntArray, val: IntArray, test: IntArray, values: NDArray[Any], names: Sequence[str]
) -> list[str]:
    """Refuse training rows of a single number; return notes on labels that cannot be learnt or tested."""
    known = np.concatenate([train, val])
    notes: list[str] = []
    if values.ndim == 1:
        if np.ptp(values[train]) == 0:
            raise FitError(
                f"all {len(train)} training rows have the number {values[train][0]:g}; add rows with other numbers"
            )
        return notes
    for part, what in ((known, MISSED), (test, "without a row in test")):
        absent = np.flatnonzero(~values[part].any(axis=0))
        if len(absent):
            shown = ", ".join(names[index] for index in absent[:MOST_NAMED])
            rest = f" and {len(absent) - MOST_NAMED} more" if len(absent) > MOST_NAMED else ""
            notes.append(f"labels {what}: {shown}{rest}")
    return notes


def _names(numbers: IntArray, classes: Sequence[str]) -> str:
    names = [classes[i] if i < len(classes) else str(i) for i in numbers[:MOST_NAMED]]
    rest = len(numbers) - len(names)
    return f"class{'es' if len(numbers) > 1 else ''} {', '.join(names)}" + (f" and {rest} more" if rest else "")
