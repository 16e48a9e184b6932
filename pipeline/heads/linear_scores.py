"""A trained head as one matrix: a score a class, the largest of which is the label."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pipeline.arrays import Float64Array
from pipeline.errors import ModelFileError


class LinearScores(NamedTuple):
    """Scores of scaled features x (d,) are ``weights @ x + bias``.

    Parameters
    ----------
    weights : (K, d) float64
    bias : (K,) float64
        In the order of the estimator's ``classes_``.
    """

    weights: Float64Array
    bias: Float64Array


def linear_scores(head: str, estimator: Any) -> LinearScores:
    """Return the scores of a trained classifier.

    Of two classes the first scores 0 and the second what scikit-learn calls the decision, so that softmax gives a
    logistic regression's probabilities for any number of classes.

    Parameters
    ----------
    head : str
        Name of its family, such as ``"logreg"``.
    estimator : sklearn classifier
        As `pipeline.heads` trains it.

    Raises
    ------
    ModelFileError
        If the head is not linear.
    """
    match head:
        case "logreg" | "linear_svm" | "ridge":
            weights = np.atleast_2d(np.asarray(estimator.coef_, np.float64))
            bias = np.atleast_1d(np.asarray(estimator.intercept_, np.float64))
            if len(weights) == 1:
                weights, bias = np.vstack([0 * weights, weights]), np.append(0.0, bias)
            return LinearScores(weights, bias)
        case "centroid":  # -|x - m|² / 2 without -|x|² / 2, which is the same for all classes
            means = np.asarray(estimator._fit_X, np.float64)
            return LinearScores(means, -0.5 * np.square(means).sum(axis=1))
        case _:
            raise ModelFileError(
                f"only heads with one hyperplane a class become part of a graph, and {head} has none; "
                "fit logreg, linear_svm, ridge or centroid"
            )
