"""Groups of near-duplicates, made of pairs."""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_array

from pipeline.arrays import IntArray
from pipeline.neighbours.nearest import Pairs


def group_images(pairs: Pairs, count: int) -> IntArray:
    """Number the groups of `count` images so that every image of a group is near its first one, the centre.

    Joining all that hangs together would chain frames of a film, each like the next, from one scene to another. So the
    image with the most near ones becomes a centre, takes these, and the rest goes on; a group that is all linked stays
    whole. An image may then be near one of another group.

    Parameters
    ----------
    pairs : Pairs
    count : int

    Returns
    -------
    (count,) int64
        The index of its centre for each image; its own for an image without a group.
    """
    centre = np.arange(count)
    if not len(pairs.first):
        return centre
    ones = np.ones(2 * len(pairs.first), bool)
    ends = np.concatenate([pairs.first, pairs.second]), np.concatenate([pairs.second, pairs.first])
    near = csr_array((ones, ends), shape=(count, count))
    degree = np.diff(near.indptr)
    free = degree > 0
    for index in np.argsort(-degree, kind="stable").tolist():
        if not free[index]:
            continue
        mine = near.indices[near.indptr[index] : near.indptr[index + 1]]
        mine = mine[free[mine]]
        centre[mine] = index
        free[mine] = free[index] = False
    return centre
