"""One hyperplane per class: labels as signs, signs as labels, and the scores of a trained head."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipeline.arrays import Float32Array, Float64Array, IntArray


class Hyperplanes(NamedTuple):
    """A trained head as one matrix. Scores of scaled features x (d,) are ``weights @ x + bias``; the largest wins.

    Parameters
    ----------
    weights : (K, d) float64
    bias : (K,) float64
        In the order of the estimator's ``classes_``.
    """

    weights: Float64Array
    bias: Float64Array


def of_each_class(coefficients: ArrayLike, intercepts: ArrayLike) -> Hyperplanes:
    """Return the hyperplanes of a scikit-learn estimator, one per class also for two classes.

    The first of two classes then scores 0 and the second what scikit-learn calls the decision function, so that the
    softmax of the scores is the probability of a logistic regression for any number of classes.
    """
    weights = np.atleast_2d(np.asarray(coefficients, np.float64))
    bias = np.atleast_1d(np.asarray(intercepts, np.float64))
    if len(weights) == 1:
        weights, bias = np.vstack([0 * weights, weights]), np.append(0.0, bias)
    return Hyperplanes(weights, bias)


def one_against_rest(y: IntArray) -> tuple[IntArray, Float32Array]:
    """Return the classes and their signs: (n, K) of -1 and 1, a single column for two classes."""
    classes = np.unique(y)
    columns = classes[1:] if len(classes) == 2 else classes
    return classes, np.where(y[:, None] == columns, np.float32(1), np.float32(-1))


def best_classes(classes: IntArray, scores: NDArray[np.floating[Any]]) -> IntArray:
    """Return the class of the largest score of each row (m, K), or by the sign if there is a single column."""
    best = (scores[:, 0] > 0).astype(np.int64) if scores.shape[1] == 1 else scores.argmax(axis=1)
    return cast("IntArray", classes[best])
