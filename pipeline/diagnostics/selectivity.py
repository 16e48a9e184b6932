"""Which units prefer a class? A rank test of every unit and class, with one error rate for all of them.

The statistic of a unit and a class is that of Wilcoxon's rank-sum test, in standard deviations: how much higher the
images of the class stand in the order of the unit's activations than images at random. A unit's statistic is the
greatest over classes. P-values compare it with the greatest statistic of all units when labels are permuted (the
single-step maxT method of Westfall & Young 1993): if no unit had anything to do with the classes, the chance that any
of them gets a p-value of at most 0.05 would be at most 5 %.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.stats import rankdata

from pipeline.arrays import Float32Array, Float64Array, IntArray, StrArray

PERMUTATIONS = 999


@dataclass(frozen=True, eq=False)
class Selectivity:
    """The statistic of every unit, and what it prefers.

    Parameters
    ----------
    statistic : (units,) float64
        0 for units that have the same activation in all images.
    label : (units,) int64
        Number of the preferred class.
    auc : (units,) float64
        How often an image of that class excites the unit more than one of another class; ties count half.
    p_value : (units,) float64
        Adjusted for all units; the smallest possible is ``1 / (permutations + 1)``.
    """

    statistic: Float64Array
    label: IntArray
    auc: Float64Array
    p_value: Float64Array


def selectivity(
    features: Float32Array, labels: IntArray, groups: StrArray, seed: int = 0, permutations: int = PERMUTATIONS
) -> Selectivity:
    """Test all units against all classes.

    Images of a group are alike, so labels are permuted inside of groups, or, where every group is of one class, between
    whole groups.

    Parameters
    ----------
    features : (n, units) float32
        The greatest activation of each unit in each image; no image twice.
    labels : (n,) int64
        At least two classes.
    groups : (n,) str
        ``""`` is no group.
    seed : int, default 0
        Draws the permutations.
    permutations : int, default 999

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> labels = np.repeat([0, 1, 2], 20)
    >>> features = rng.normal(size=(60, 4)).astype(np.float32)
    >>> features[labels == 2, 1] += 3
    >>> found = selectivity(features, labels, np.full(60, ""))
    >>> found.label[1].item(), found.p_value[1].item(), (found.p_value > 0.05).sum().item()
    (2, 0.001, 3)
    """
    classes, numbers = np.unique(labels, return_inverse=True)
    ranks = _standardised_ranks(features)
    observed = _statistics(ranks, numbers, len(classes))
    greatest = observed.max(0)
    rng = np.random.default_rng(seed)
    reached = np.ones(len(greatest))
    for _ in range(permutations):
        permuted = _permuted(numbers, groups, rng)
        reached += _statistics(ranks, permuted, len(classes)).max() >= greatest - 1e-4  # float32 sums differ by order
    best = observed.argmax(0)
    return Selectivity(greatest, classes[best], _auc(features, numbers, best), reached / (permutations + 1))


def _standardised_ranks(features: Float32Array) -> Float32Array:
    ranks = rankdata(features, axis=0)
    deviation = ranks.std(axis=0)
    scaled = (ranks - ranks.mean(axis=0)) / np.where(deviation > 0, deviation, 1.0)
    return np.ascontiguousarray(scaled, np.float32)


def _statistics(ranks: Float32Array, labels: IntArray, classes: int) -> Float64Array:
    """Return the statistic of each class and unit (classes, units)."""
    n = len(labels)
    members = csr_array((np.ones(n, np.float32), (labels, np.arange(n))), shape=(classes, n))
    counts = np.bincount(labels, minlength=classes)[:, None]
    return np.asarray((members @ ranks) / np.sqrt(counts * (n - counts) / (n - 1)), np.float64)


def _permuted(labels: IntArray, groups: StrArray, rng: np.random.Generator) -> IntArray:
    """Return the labels, permuted inside of groups or, where every group has one label, between whole groups."""
    _, first, group = np.unique(groups, return_index=True, return_inverse=True)
    alone = groups == ""
    permuted = labels.copy()
    if (labels == labels[first][group])[~alone].all():  # an image without a group is a group of its own
        units = np.where(alone, len(first) + np.arange(len(groups)), group)
        _, first, unit = np.unique(units, return_index=True, return_inverse=True)
        return np.asarray(rng.permutation(labels[first])[unit])
    order = np.lexsort((rng.random(len(labels)), group))
    permuted[np.argsort(group, kind="stable")] = labels[order]
    return permuted


def _auc(features: NDArray[np.float32], labels: IntArray, best: IntArray) -> Float64Array:
    auc = np.empty(features.shape[1])
    for unit, label in enumerate(best.tolist()):
        own = labels == label
        ranks = rankdata(features[:, unit])
        auc[unit] = (ranks[own].mean() - (own.sum() + 1) / 2) / (~own).sum()
    return auc
