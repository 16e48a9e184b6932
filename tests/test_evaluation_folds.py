from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import FitError
from pipeline.evaluation.folds import cross_splits, stratified_folds
from pipeline.evaluation.splits import Splits

CLASSES = ("ape", "bee", "cat", "dog", "elk")


def digests_of(images: Any) -> np.ndarray:
    images = np.asarray(images)
    digests = np.zeros((len(images), 16), np.uint8)
    digests[:, :8] = images.astype(">u8").view(np.uint8).reshape(len(images), 8)
    return digests


def crossed(labels: Any, count: int = 5, groups: Any = None, images: Any = None, **rest: Any) -> list[Splits]:
    labels = np.asarray(labels, np.int64)
    n = len(labels)
    given_splits = rest.pop("given", np.array([""] * n))
    groups = np.array([""] * n if groups is None else groups)
    digests = digests_of(np.arange(n) if images is None else images)
    return cross_splits(labels, given_splits, groups, digests, rest.pop("seed", 0), count, classes=CLASSES, **rest)


@given(st.lists(st.integers(0, 4), min_size=2, max_size=50), st.integers(2, 5), st.integers(0, 3))
def test_folds_part_the_rows_and_spread_each_class(labels: list[int], count: int, seed: int) -> None:
    array = np.array(labels)
    folds = stratified_folds(array, np.arange(len(array)), count, seed)
    for rest, held in folds:
        assert sorted([*rest, *held]) == list(range(len(labels)))
        assert len(np.unique(array[rest])) > 1
    if len(folds) == count:
        assert sorted(row for _, held in folds for row in held) == list(range(len(labels)))
        spread = np.array([np.bincount(array[held], minlength=5) for _, held in folds])
        assert (spread.max(axis=0) - spread.min(axis=0)).max() <= 1


@given(st.data())
def test_linked_rows_are_held_out_together(data: st.DataObject) -> None:
    n = data.draw(st.integers(4, 60))
    labels = np.array(data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)))
    units = np.array(data.draw(st.lists(st.integers(0, 12), min_size=n, max_size=n)))
    for rest, held in stratified_folds(labels, units, 3, 0):
        assert not set(units[rest]) & set(units[held])


def test_groups_of_one_class_are_dealt_evenly() -> None:
    labels = np.repeat([0, 1], 60)
    units = np.arange(120) // 6  # ten groups of six a class
    for _, held in stratified_folds(labels, units, 5, 1):
        assert np.bincount(labels[held]).tolist() == [12, 12]


def test_every_row_is_test_once_and_val_is_cut_from_the_others() -> None:
    labels = np.arange(100) % 4
    images = np.where(np.arange(100) % 10 == 9, 5, np.arange(100))  # eleven byte-equal rows
    splits = crossed(labels, images=images)
    assert sorted(row for split in splits for row in split.test) == list(range(100))
    for split in splits:
        assert sorted([*split.train, *split.val, *split.test]) == list(range(100))
        for one, other in ((split.train, split.test), (split.val, split.test), (split.train, split.val)):
            assert not set(images[one]) & set(images[other])
    first, second = (crossed(labels, seed=seed)[0].test.tolist() for seed in (0, 1))
    assert first != second


def test_shots_are_drawn_from_the_other_folds() -> None:
    labels = np.arange(60) % 3
    for split in crossed(labels, count=3, shots=4):
        assert np.bincount(labels[split.train]).tolist() == [4, 4, 4]
        assert split.val.size == 0
        assert len(split.test) == 20


def test_a_class_of_one_row_is_said_to_be_unlearnable_in_its_fold() -> None:
    notes = {note for split in crossed([0, 1] * 10 + [2]) for note in split.notes}
    assert notes == {"without a training row, so each of its test rows counts as an error: class cat"}


@pytest.mark.parametrize(
    ("labels", "arguments", "message"),
    [
        ([0, 1, 0, 1], {"count": 5}, "cannot make 5 folds of 4 rows in 4 independent groups.*use fewer folds"),
        ([0, 1] * 10, {"groups": ["a"] * 10 + ["b"] * 10}, "5 folds of 20 rows in 2 independent groups"),
        ([0] * 20, {}, r"two classes \(or ranges of a number\) outside"),
        ([0, 1] * 10, {"count": 1}, "at least 2"),
        ([-1] * 20, {}, "no row has a label"),
        ([0, 1] * 10, {"given": np.array(["train"] * 15 + ["test"] * 5)}, "5 rows are given as test; fit without cv"),
    ],
)
def test_what_cannot_be_cross_validated_is_refused(labels: list[int], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(FitError, match=message) as caught:
        crossed(labels, **arguments)
    assert "\n" not in str(caught.value)
