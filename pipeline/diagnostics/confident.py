"""Confident learning: labels that probabilities contradict (Northcutt, Jiang and Chuang 2021)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pipeline.arrays import BoolArray, Float64Array, IntArray

PRIOR = 2.0
"""Weight of equal rates for all pairs of classes, against the rates that were counted."""
TINY = 1e-300


class Doubts(NamedTuple):
    """What is to be thought of each label.

    Attributes
    ----------
    flagged : (n,) bool
        Whether a label is probably wrong.
    suggested : (n,) int64
        The class that fits best other than the label.
    order : (n,) int64
        All rows, the most doubtful first.
    """

    flagged: BoolArray
    suggested: IntArray
    order: IntArray


def doubt_labels(probabilities: Float64Array, labels: IntArray) -> Doubts:
    """Find labels that are probably wrong.

    A class is likely for a row if its probability is at least the mean probability of that class among the rows that
    have its label: so classes about which the head is less sure in general are held to less. A label is flagged if the
    likeliest of the likely classes is another.

    Rows are ordered by the odds that the label is wrong, by Bayes' rule: the probabilities of the other classes, each
    times the rate at which it is given this label by mistake, against that of the label. The rates are counted among
    the flagged rows, and drawn towards a rate that is the same for all pairs of classes.

    Parameters
    ----------
    probabilities : (n, K) float64
        Of heads that have not seen the rows; at least two classes.
    labels : (n,) int64

    Examples
    --------
    >>> doubts = doubt_labels(np.array([[0.9, 0.1], [0.8, 0.2], [0.2, 0.8], [0.95, 0.05]]), np.array([0, 0, 1, 1]))
    >>> doubts.flagged, doubts.order
    (array([False, False, False,  True]), array([3, 2, 1, 0]))
    """
    rows, classes = np.arange(len(labels)), probabilities.shape[1]
    totals = np.bincount(labels, probabilities[rows, labels], classes)
    sizes = np.bincount(labels, minlength=classes)
    usual = np.where(sizes > 0, totals / np.maximum(sizes, 1), np.inf)
    likely = np.where(probabilities >= usual, probabilities, -1)
    flagged = (likely.max(axis=1) >= 0) & (likely.argmax(axis=1) != labels)
    others = probabilities.copy()
    others[rows, labels] = -1
    suggested = np.where(flagged, likely.argmax(axis=1), others.argmax(axis=1))
    counts = np.zeros((classes, classes))  # of likely classes and labels
    known = likely.max(axis=1) >= 0
    np.add.at(counts, (likely.argmax(axis=1)[known], labels[known]), 1)
    mistaken = _rates(counts)
    wrong = (probabilities @ mistaken)[rows, labels]
    right = probabilities[rows, labels] * (1 - mistaken.sum(axis=1))[labels]
    return Doubts(flagged, suggested, np.argsort(right / np.maximum(wrong, TINY), kind="stable"))


def _rates(counts: Float64Array) -> Float64Array:
    """Return how often each class (rows) is given each other label (columns) by mistake."""
    others = counts * (1 - np.eye(len(counts)))
    overall = max(others.sum() / max(counts.sum(), 1), 1 / (counts.sum() + 1))
    totals = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    alike = overall / (len(counts) - 1) * (1 - np.eye(len(counts)))
    return np.asarray((others / totals + PRIOR * alike) / (1 + PRIOR), np.float64)
