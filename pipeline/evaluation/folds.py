"""Cross-validation: stratified folds that keep linked rows together, and the splits made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.arrays import IntArray, StrArray
from pipeline.errors import FitError
from pipeline.evaluation.leaks import NearDuplicates, join_units
from pipeline.evaluation.splits import (
    MISSED,
    Splits,
    check_parts,
    check_values,
    draw_shots,
    hold_out_val,
    labelled_rows,
)


def stratified_folds(labels: IntArray, units: IntArray, count: int, seed: int) -> list[tuple[IntArray, IntArray]]:
    """Cut rows into folds, each class spread over them as evenly as possible if linked rows stay together.

    Scikit-learn's `StratifiedGroupKFold` would draw other folds, so that earlier results could not be reproduced.

    Parameters
    ----------
    labels : (n,) int64
        Class numbers.
    units : (n,) int64
        Rows of equal number stay together.
    count : int
        Number of folds. A fold is left out of the result if the rows outside it are of a single class.
    seed : int
        Draws the folds.

    Returns
    -------
    list of (train, held)
        Sorted positions in `labels`.
    """
    rng = np.random.default_rng(seed)
    codes = np.unique(labels, return_inverse=True)[1]
    order = rng.permutation(len(labels))
    order = order[np.argsort(units[order], kind="stable")]
    sets = np.split(order, np.flatnonzero(np.diff(units[order])) + 1)
    sets = sorted((sets[index] for index in rng.permutation(len(sets))), key=len, reverse=True)  # large ones first
    share = 1 / np.bincount(codes)
    filled = np.zeros((count, len(share)))  # the share of each class in each fold
    sizes = np.zeros(count, np.int64)
    fold = np.empty(len(labels), np.int64)
    for rows in sets:
        crowding = filled[:, codes[rows]].sum(axis=1)
        best = int(np.lexsort((sizes, np.round(crowding, 9)))[0])
        fold[rows] = best
        np.add.at(filled[best], codes[rows], share[codes[rows]])
        sizes[best] += len(rows)
    pairs = [(np.flatnonzero(fold != number), np.flatnonzero(fold == number)) for number in range(count)]
    return [(rest, held) for rest, held in pairs if len(held) and len(np.unique(labels[rest])) > 1]


def cross_splits(
    labels: IntArray,
    given: StrArray,
    groups: StrArray,
    digests: NDArray[np.uint8],
    seed: int,
    count: int,
    shots: int | str = "all",
    classes: Sequence[str] = (),
    *,
    near: NearDuplicates | None = None,
    values: NDArray[Any] | None = None,
) -> list[Splits]:
    """Make every labelled row a test row once: one split per fold, with val (or shots) drawn from the other folds.

    Parameters
    ----------
    labels, given, groups, digests, seed, shots, classes, near, values
        As for `pipeline.evaluation.splits.make_splits`; a given val split is ignored, and no row is left out.
    count : int
        Number of folds.

    Raises
    ------
    FitError
        If the source gives a test split, or its rows do not allow so many folds.
    """
    rows = labelled_rows(labels)
    given_test = int((given[rows] == "test").sum())
    if given_test:
        raise FitError(
            f"cross-validation is for sources without a test split, but {given_test} rows are given as test; "
            "fit without cv to test on them"
        )
    units = join_units(groups, digests, near)
    if count < 2:
        raise FitError(f"cross-validation needs at least 2 folds, got {count}")
    n_units = len(np.unique(units[rows]))
    folds = stratified_folds(labels[rows], units[rows], count, seed) if count <= n_units else []
    if len(folds) < count:
        raise FitError(
            f"cannot make {count} folds of {len(rows)} rows in {n_units} independent groups: every fold needs a group, "
            "and two classes (or ranges of a number) outside it; use fewer folds"
        )
    rng = np.random.default_rng(seed)
    return [_split(rows[rest], rows[held], labels, units, rng, shots, classes, values) for rest, held in folds]


def _split(
    train: IntArray,
    test: IntArray,
    labels: IntArray,
    units: IntArray,
    rng: np.random.Generator,
    shots: int | str,
    classes: Sequence[str],
    values: NDArray[Any] | None,
) -> Splits:
    notes: list[str] = []
    n_pool = len(train)
    if shots == "all":
        train, val = hold_out_val(train, labels, units, rng)
    else:
        train, val = draw_shots(train, labels, int(shots), rng, notes, classes), train[:0]
    if values is None:
        found = check_parts(train, val, test, labels, classes)
    else:
        found = check_values(train, val, test, values, classes)
    notes += [note for note in found if MISSED in note]  # that a fold's val or test lacks a class is not worth one
    return Splits(train, val, test, notes, [], units, n_pool)
