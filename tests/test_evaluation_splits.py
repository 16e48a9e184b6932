from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import FitError
from pipeline.evaluation.leaks import NearDuplicates, cluster_notes, clusters_of, join_units
from pipeline.evaluation.splits import Splits, make_splits


def split(labels: Any, given_splits: Any = None, groups: Any = None, images: Any = None, **rest: Any) -> Splits:
    """Call `make_splits` with plain lists; `images` are numbers, equal ones equal bytes."""
    labels = np.asarray(labels, np.int64)
    n = len(labels)
    images = np.arange(n) if images is None else np.asarray(images)
    digests = np.zeros((n, 16), np.uint8)
    digests[:, :8] = images.astype(">u8").view(np.uint8).reshape(n, 8)
    arguments = {"seed": 0} | rest
    return make_splits(
        labels,
        np.array([""] * n if given_splits is None else given_splits),
        np.array([""] * n if groups is None else groups),
        digests,
        **arguments,
    )


def parts(found: Splits) -> list[list[int]]:
    return [found.train.tolist(), found.val.tolist(), found.test.tolist()]


def test_missing_splits_are_cut_by_class_in_the_stated_shares() -> None:
    labels = np.repeat([0, 1, 2], [100, 50, 10])
    found = split(labels)
    assert np.bincount(labels[found.test]).tolist() == [20, 10, 2]
    assert np.bincount(labels[found.val]).tolist() == [16, 8, 2]
    assert sorted(row for part in parts(found) for row in part) == list(range(160))
    assert len(found.notes) == 2
    assert found.leaks == []


def test_shots_are_drawn_from_training_rows_and_what_is_left_out_is_in_no_pool() -> None:
    labels, given_splits = np.arange(90) % 3, np.repeat(["train", "val", "test"], 30)
    assert split(labels, given_splits).n_pool == 60
    assert split(labels, given_splits, shots=3).n_pool == 30
    images = np.r_[np.arange(60), np.arange(10), 100 + np.arange(20)]  # ten test images are copies
    assert split(labels, given_splits, images=images, drop_leaks=True).n_pool == 60
    assert split(labels).n_pool == 72, "20 % are drawn for the test"


def test_a_test_set_that_is_drawn_is_apart_from_given_validation_rows() -> None:
    labels = np.arange(60) % 2
    given_splits = np.where(np.arange(60) % 3 == 2, "val", "train")
    groups = [f"g{i // 3}" if i < 30 else "" for i in range(60)]  # each with two training rows and one for validation
    found = split(labels, given_splits, groups)
    assert found.test.min() >= 30
    assert not np.intersect1d(found.units[found.test], found.units[np.r_[found.train, found.val]]).size
    with pytest.raises(FitError, match="cannot draw a test set"):
        split(labels[:30], given_splits[:30], groups[:30])


def test_equal_bytes_and_near_duplicates_count_together_under_a_name_of_their_own() -> None:
    groups = np.array(["ann", "bob", "", "", "", "", "cy"])
    digests = np.array([[1] * 16, [2] * 16, [2] * 16, [3] * 16, [3] * 16, [4] * 16, [1] * 16], np.uint8)
    found = clusters_of(groups, digests, None)
    assert found.tolist() == ["ann", "bob", "bob", found[3], found[3], "", "ann"]
    assert found[3].startswith("alike ")
    assert clusters_of(groups[3:], digests[3:], None)[:2].tolist() == [found[3], found[3]], "whatever else there is"
    assert clusters_of(groups[5:], digests[5:], None).tolist() == ["", "cy"]
    images, joined, none = np.arange(7), np.array([0, 0, 1, 2, 3, 4, 5]), np.empty(0, np.int64)
    near = clusters_of(groups, digests[[0, 1, 3, 5, 5, 5, 5]], NearDuplicates(images, joined, none, none))
    assert near.tolist() == ["ann", "ann", "", "", "", "", "cy"]
    assert cluster_notes(found, groups) == [
        "6 test rows come from 3 groups (equal and nearly equal images are of one group), "
        "so intervals and tests are over groups, not rows"
    ]
    assert cluster_notes(groups, groups) == [], "no group has two rows"
    twice = np.array(["ann", "ann", found[3], ""])
    assert cluster_notes(twice, np.array(["ann", "ann", "", ""]))[0].startswith("3 test rows come from 2 groups, so")


def test_the_seed_and_nothing_else_draws_the_cut() -> None:
    labels = np.repeat([0, 1], 50)
    assert parts(split(labels, seed=3)) == parts(split(labels, seed=3))
    assert parts(split(labels, seed=3)) != parts(split(labels, seed=4))


@settings(max_examples=60)
@given(st.data())
def test_linked_rows_stay_on_one_side_whatever_the_links(data: st.DataObject) -> None:
    n = data.draw(st.integers(20, 60))
    labels = np.arange(n) % 3
    groups = data.draw(st.lists(st.sampled_from(["", "", "", "a", "b", "c", "d"]), min_size=n, max_size=n))
    images = data.draw(st.lists(st.integers(0, 80), min_size=n, max_size=n))
    try:
        found = split(labels, groups=groups, images=images, seed=data.draw(st.integers(0, 9)))
    except FitError:
        return
    side = np.zeros(n, int)
    side[found.val], side[found.test] = 1, 2
    assert sorted(row for part in parts(found) for row in part) == list(range(n))
    assert len(found.test)
    assert found.leaks == []
    for column in (groups, images):
        for value in set(column) - {""}:
            assert len({int(side[i]) for i in range(n) if column[i] == value}) == 1


def test_links_hold_through_chains_of_groups_and_bytes() -> None:
    digests = np.zeros((6, 16), np.uint8)
    digests[:, 0] = [1, 1, 2, 2, 3, 4]
    units = join_units(np.array(["", "a", "a", "", "", ""]), digests)
    assert len(set(units[:4])) == 1
    assert len(set(units)) == 3


def test_groups_give_shares_as_near_as_they_can() -> None:
    labels = np.repeat([0, 1], 100)
    groups = [f"{label}-{i // 5}" for label in (0, 1) for i in range(100)]
    found = split(labels, groups=groups)
    assert np.bincount(labels[found.test]).tolist() == [20, 20]
    assert np.bincount(labels[found.val]).tolist() == [15, 15]


def test_two_groups_give_a_test_set_rather_than_none() -> None:
    found = split([0, 1] * 10, groups=["a"] * 12 + ["b"] * 8)
    assert found.test.tolist() == list(range(12, 20))
    assert found.val.tolist() == []
    assert any("parameters are chosen inside train" in note for note in found.notes)


def test_given_splits_are_used_as_they_are() -> None:
    names = ["train"] * 6 + ["val"] * 2 + ["test"] * 2
    found = split([0, 1] * 5, names)
    assert parts(found) == [list(range(6)), [6, 7], [8, 9]]
    assert found.notes == []


def test_val_is_cut_from_train_where_only_train_and_test_are_given() -> None:
    found = split([0, 1] * 20, ["train"] * 30 + ["test"] * 10)
    assert found.test.tolist() == list(range(30, 40))
    assert len(found.val) == 6
    assert found.val.max() < 30
    assert any("no val split" in note for note in found.notes)


def test_a_missing_test_is_cut_from_train_and_the_given_val_stays_val() -> None:
    labels = np.array([0, 1] * 20)
    found = split(labels, ["train"] * 30 + ["val"] * 10)
    assert found.val.tolist() == list(range(30, 40))
    assert np.bincount(labels[found.test]).tolist() == [3, 3]
    assert sorted([*found.train, *found.test]) == list(range(30))
    assert any("no test split given" in note for note in found.notes)


def test_rows_without_a_split_train_where_others_have_one() -> None:
    found = split([0, 1] * 20, [""] * 30 + ["test"] * 10)
    assert found.test.tolist() == list(range(30, 40))
    assert "30 rows have no split while others have one; they are used for training" in found.notes


def test_unlabelled_rows_are_in_no_part() -> None:
    labels = np.array([0, 1, -1, -1] * 20)
    found = split(labels)
    assert (labels[np.concatenate([found.train, found.val, found.test])] >= 0).all()
    assert sum(map(len, parts(found))) == 40


def test_leaks_across_given_splits_are_counted_named_and_paired() -> None:
    names = ["train"] * 4 + ["val"] * 2 + ["test"] * 2
    images = [10, 11, 12, 13, 14, 11, 14, 10]
    found = split([0, 1] * 4, names, images=images, uris=[f"img{i}" for i in range(8)])
    assert sorted(found.leaks) == [(5, 1), (6, 4), (7, 0)]
    assert "2 test images are also in train or val: img6 = img4, img7 = img0" in found.notes
    assert "1 val images are also in train: img5 = img1" in found.notes


def test_groups_torn_by_given_splits_are_told() -> None:
    found = split([0, 1] * 4, ["train"] * 4 + ["val"] * 2 + ["test"] * 2, groups=["a", "b", "", "", "", "", "a", ""])
    assert "1 groups have rows in test and in train or val" in found.notes


@pytest.mark.parametrize("shots", [1, 5])
def test_shots_are_drawn_per_class_from_train_and_val_is_not_used(shots: int) -> None:
    labels = np.array([0, 1, 2] * 20)
    names = ["train"] * 36 + ["val"] * 12 + ["test"] * 12
    found = split(labels, names, shots=shots)
    assert np.bincount(labels[found.train]).tolist() == [shots] * 3
    assert found.train.max() < 36
    assert found.val.size == 0
    assert found.test.tolist() == list(range(48, 60))
    assert found.train.tolist() != split(labels, names, shots=shots, seed=1).train.tolist()


def test_a_class_with_fewer_rows_than_shots_is_named() -> None:
    found = split([0] * 20 + [1] * 3, ["train"] * 15 + ["test"] * 5 + ["train"] * 2 + ["test"], shots=5, classes="xy")
    assert "fewer than 5 training rows: class y" in found.notes
    assert len(found.train) == 7


def test_classes_missing_from_a_part_are_named() -> None:
    labels = [0, 1, 2, 0, 1, 2, 0, 1, 3]
    names = ["train"] * 6 + ["test"] * 3
    notes = split(labels, names, classes=["ape", "bee", "cat", "dog"]).notes
    assert "without a training row, so each of its test rows counts as an error: class dog" in notes
    assert "without a row in test: class cat" in notes


def test_a_class_that_val_brings_is_learnt_before_test() -> None:
    notes = split([0, 1, 0, 1, 2, 2], ["train"] * 4 + ["val", "test"]).notes
    assert not any("counts as an error" in note for note in notes)


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        ([-1, -1], None, "no row has a label"),
        ([0] * 20, None, "at least two classes among the training rows, found only class ape"),
        ([0, 1] * 3, ["test"] * 6, "every labelled row is given as val or test"),
        ([0, 1, 0, 1], None, "cannot draw a test set from 4 training rows"),
    ],
)
def test_what_cannot_be_split_is_refused(labels: list[int], names: list[str] | None, message: str) -> None:
    with pytest.raises(FitError, match=message):
        split(labels, names, classes=["ape", "bee"])


def test_one_group_cannot_be_split() -> None:
    with pytest.raises(FitError, match="not all in one group"):
        split([0, 1] * 10, groups=["a"] * 20)


def test_leaks_may_be_dropped_from_test_and_shots_do_not_change_what_is_dropped() -> None:
    labels = [0, 1] * 8
    names = ["train"] * 8 + ["val"] * 2 + ["test"] * 6
    images = [*range(10), 3, 11, 9, 13, 14, 15]
    for shots in ("all", 1):
        found = split(labels, names, images=images, drop_leaks=True, shots=shots)
        assert found.test.tolist() == [11, 13, 14, 15]
        assert found.leaks == []
        assert "2 of 6 test images repeat training images and were left out" in found.notes
    assert split(labels, names, drop_leaks=True).test.tolist() == list(range(10, 16))


def test_a_test_of_nothing_but_leaks_is_refused() -> None:
    with pytest.raises(FitError, match="all 2 test images repeat training images"):
        split([0, 1] * 4, ["train"] * 6 + ["test"] * 2, images=[0, 1, 2, 3, 4, 5, 0, 1], drop_leaks=True)
