"""What must not be on both sides of a split: rows of one group, and images of equal bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from features_cache import digest_keys
from pipeline.arrays import BoolArray, IntArray, StrArray

MOST_NAMED = 5


@dataclass(frozen=True, eq=False)
class NearDuplicates:
    """Which of n rows show nearly the same; see `pipeline.neighbours`.

    Parameters
    ----------
    images : (n,) int64
        Number of the image that each row shows; rows of equal bytes show one.
    groups : (m,) int64
        Images of equal number must stay together.
    first, second : (p,) int64
        Pairs of images that are near, also those of different groups.
    """

    images: IntArray
    groups: IntArray
    first: IntArray
    second: IntArray

    def near_to(self, rows: IntArray) -> BoolArray:
        """Tell of each row (n,) whether its image is among the images of `rows` (k,), or near one of them."""
        among = np.zeros(len(self.groups), bool)
        among[self.images[rows]] = True
        near = among.copy()
        near[self.second[among[self.first]]] = True
        near[self.first[among[self.second]]] = True
        return np.asarray(near[self.images])


def join_units(groups: StrArray, digests: NDArray[np.uint8], near: NearDuplicates | None = None) -> IntArray:
    """Number the sets of rows that must stay together: linked by a group or by equal bytes, directly or in a chain.

    Parameters
    ----------
    groups : (n,) str
        ``""`` is no group.
    digests : (n, 16) uint8
        Digests of the images' bytes.
    near : NearDuplicates, optional
        Then groups of near-duplicates link rows, too.

    Returns
    -------
    (n,) int64
        Rows of equal number must stay together.
    """
    if near is None:
        _, images = np.unique(digest_keys(digests), return_inverse=True)
    else:
        images = near.groups[near.images]
    names, named = np.unique(groups, return_inverse=True)
    linked = groups != ""
    most = max(len(groups), int(images.max(initial=0)) + 1)
    nodes = most + len(names)
    edges = (images[linked], most + named[linked])
    graph = coo_array((np.ones(int(linked.sum())), edges), shape=(nodes, nodes))
    _, component = connected_components(graph, directed=False)
    return np.asarray(component[images], np.int64)


def find_leaks(train: IntArray, val: IntArray, test: IntArray, digests: NDArray[np.uint8]) -> list[tuple[int, int]]:
    """Pair each test row with an equal image of train or val, and each val row with one of train."""
    keys = digest_keys(digests)
    pairs: list[tuple[int, int]] = []
    for held, before in ((test, np.concatenate([train, val])), (val, train)):
        known, first = np.unique(keys[before], return_index=True)
        nearest = np.minimum(np.searchsorted(known, keys[held]), len(known) - 1)
        hits = np.flatnonzero(known[nearest] == keys[held])
        pairs += [(int(held[i]), int(before[first[nearest[i]]])) for i in hits]
    return pairs


def leak_notes(leaks: list[tuple[int, int]], test: IntArray, uris: Sequence[str]) -> list[str]:
    """Return one note for test and one for val on how many of their images are also in an earlier part, and which.

    Parameters
    ----------
    leaks : list of (int, int)
        Of `find_leaks`.
    test : (k,) int64
        Row numbers.
    uris : sequence of str
        Names of all rows; if empty, the notes give row numbers.
    """
    in_test = set(test.tolist())
    sides = {"test": [pair for pair in leaks if pair[0] in in_test], "val": [p for p in leaks if p[0] not in in_test]}
    before = {"test": "train or val", "val": "train"}
    notes = []
    for side, pairs in sides.items():
        if pairs:
            named = [" = ".join(str(uris[i]) if len(uris) else f"row {i}" for i in pair) for pair in pairs[:MOST_NAMED]]
            rest = f" and {len(pairs) - len(named)} more" if len(pairs) > len(named) else ""
            notes.append(f"{len(pairs)} {side} images are also in {before[side]}: {', '.join(named)}{rest}")
    return notes


def group_notes(train: IntArray, val: IntArray, test: IntArray, groups: StrArray) -> list[str]:
    """Return a note on how many groups the given splits divide between test and the other parts."""
    divided = np.intersect1d(groups[np.concatenate([train, val])], groups[test])
    count = int((divided != "").sum())
    return [f"{count} groups have rows in test and in train or val"] if count else []


def clusters_of(groups: StrArray, digests: NDArray[np.uint8], near: NearDuplicates | None) -> StrArray:
    """Return what counts together in intervals and tests: rows of one group or of equal bytes, and near-duplicates.

    The name (n,) of each row's cluster is the first of its groups in the order of names, or else made of the least
    digest, and ``""`` for a row alone.
    """
    units = join_units(groups, digests, near)
    joined = np.flatnonzero((np.bincount(units) > 1)[units])
    names, bare = groups[joined], np.flatnonzero(groups[joined] == "")
    if len(bare):
        own = np.array(["alike " + digest[:8].tobytes().hex() for digest in digests[joined[bare]]])
        names = names.astype(np.result_type(names, own))
        names[bare] = own
    order = np.lexsort((names, groups[joined] == ""))
    cluster, first = np.unique(units[joined][order], return_index=True)
    named = names[order][first][np.searchsorted(cluster, units[joined])]
    if (named == groups[joined]).all():
        return groups
    clusters = groups.astype(np.result_type(groups, named))
    clusters[joined] = named
    return clusters


def cluster_notes(clusters: StrArray, groups: StrArray) -> list[str]:
    """Return a note if test rows (n,) come in clusters, such as photos of a few people, or equal images."""
    names, numbers, counts = np.unique(clusters, return_inverse=True, return_counts=True)
    several = (clusters != "") & (counts[numbers] > 1)
    if not several.any():
        return []
    names, counts = names[names != ""], counts[names != ""]
    alike = " (equal and nearly equal images are of one group)" if (several & (clusters != groups)).any() else ""
    return [
        f"{counts.sum()} test rows come from {len(names)} groups{alike}, "
        "so intervals and tests are over groups, not rows"
    ]
