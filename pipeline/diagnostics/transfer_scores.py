"""How well features suit a target, without training: LogME, and for classes H-score and LEEP. Higher is better."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.linalg import eigh
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, logsumexp

from pipeline.arrays import Float64Array, FloatArray, IntArray

_RATIOS = np.linspace(-14, 14, 57)
"""Grid of the first search: decimal logarithms of the precision ratio, relative to the mean squared singular value."""


class Projection(NamedTuple):
    """Targets projected on the singular vectors of the features.

    Parameters
    ----------
    squares : (r,) float64
        Squared singular values of the rows; r is their rank.
    shares : (r, K) float64
        Squared inner products of the left singular vectors with each target.
    sizes : (K,) float64
        Sums of squares of the targets; of class indicators the number of rows of each class.
    """

    squares: Float64Array
    shares: Float64Array
    sizes: Float64Array


def indicators(labels: IntArray) -> Float64Array:
    """Return 1 where a row is of a class and 0 elsewhere (n, K), for labels (n,)."""
    codes = np.unique(labels, return_inverse=True)[1]
    return np.eye(codes.max() + 1)[codes]


def project(features: FloatArray, targets: Float64Array) -> Projection:
    """Project targets (n, K) by an eigendecomposition of the smaller Gram matrix, in float64."""
    rows = features.astype(np.float64)
    wide = rows.shape[1] > len(rows)
    squares, vectors = eigh(rows @ rows.T if wide else rows.T @ rows, overwrite_a=True)
    kept = squares > squares[-1] * max(rows.shape) * np.finfo(np.float64).eps
    squares, vectors = squares[kept], vectors[:, kept]
    inner = vectors.T @ (targets if wide else rows.T @ targets)
    if not wide:
        inner /= np.sqrt(squares)[:, None]
    return Projection(squares, np.square(inner), np.square(targets).sum(axis=0))


def logme(features: FloatArray, targets: Float64Array) -> float:
    """Return the maximum log evidence per row of a Bayesian linear regression on targets (You et al. 2021).

    This is the mean over targets of ``max over a, b of log p(y | F, a, b) / n``, where weights are normal with
    precision a and noise with precision b. The best b for a given ratio of the two is known, so the search is over one
    number per target.

    Parameters
    ----------
    features : (n, d) float
        As cached, neither centred nor scaled.
    targets : (n, K) float64
        The `indicators` of classes, labels of 0 and 1, or a number, standardised so that layers of other rows compare.
    """
    found = project(features, targets)
    n = len(targets)
    rest = np.maximum(found.sizes - found.shares.sum(axis=0), 0.0)  # the part of |y|² outside the span of the rows
    if not found.squares.size:
        return float(np.mean([_evidence(n, size, 0.0) for size in found.sizes]))
    unit = found.squares.mean()

    def evidence(exponent: float, number: int) -> float:
        gain = found.squares / (unit * 10.0**exponent)
        left = float((found.shares[:, number] / (1 + gain)).sum() + rest[number])
        return _evidence(n, left, float(np.log1p(gain).sum()))

    best = []
    for number in range(len(found.sizes)):
        coarse = [evidence(exponent, number) for exponent in _RATIOS]
        peak = _RATIOS[int(np.argmax(coarse))]
        step = _RATIOS[1] - _RATIOS[0]
        fine = minimize_scalar(
            lambda exponent, number=number: -evidence(exponent, number), bounds=(peak - step, peak + step)
        )
        best.append(max(-fine.fun, *coarse))
    return float(np.mean(best)) / n


def _evidence(n: int, left: float, log_determinant: float) -> float:
    """Return the log evidence at the best noise precision, for a quadratic form of the covariance equal to `left`."""
    left = max(left, n * np.finfo(np.float64).eps)  # an exact fit would make the evidence infinite
    return float(-0.5 * (n * np.log(2 * np.pi * left / n) + n + log_determinant))


def h_score(features: FloatArray, labels: IntArray) -> float:
    """Return the proportion of the features' variance between classes, summed over directions: 0 to K - 1.

    This is the H-score of Bao et al. (2019) with the covariance shrunk as by Ledoit and Wolf (2004), after Ibrahim et
    al. (2022). The plain score is K - 1 for any features if there are as many of them as rows.

    Parameters
    ----------
    features : (n, d) float
    labels : (n,) int64
    """
    centred = features - features.mean(axis=0, dtype=np.float64)
    found = project(centred, indicators(labels))
    if not found.squares.size:
        return 0.0
    n, d = centred.shape
    variances = found.squares / n
    between = variances * (found.shares / found.sizes).sum(axis=1)
    shrinkage = _ledoit_wolf(centred, variances)
    shrunk = (1 - shrinkage) * variances + shrinkage * variances.sum() / d
    return float((1 - shrinkage) * (between / shrunk).sum())


def _ledoit_wolf(centred: Float64Array, variances: Float64Array) -> float:
    """Return the shrinkage (0 to 1) for the covariance of rows (n, d) with these non-zero eigenvalues."""
    n, d = centred.shape
    square = float(np.square(variances).sum())
    distance = square - variances.sum() ** 2 / d
    fourth = float(np.square(np.einsum("nd,nd->n", centred, centred)).sum())
    noise = (fourth / n - square) / n
    return float(min(noise, distance) / distance) if distance > 0 else 0.0


def leep(logits: FloatArray, labels: IntArray) -> float:
    """Return the mean log-likelihood of the labels under the empirical classifier of Nguyen et al. (2020).

    The classifier predicts a label from the classes of the source network, by how often the two occur together.

    Parameters
    ----------
    logits : (n, Z) float
        Logits of the Z classes of the source network.
    labels : (n,) int64
    """
    log_source = log_softmax(logits.astype(np.float64), axis=1)  # (n, Z)
    classes, codes = np.unique(labels, return_inverse=True)
    joint = np.stack([logsumexp(log_source[codes == code], axis=0) for code in range(len(classes))])  # (K, Z)
    conditional = joint - logsumexp(joint, axis=0)
    return float(logsumexp(conditional[codes] + log_source, axis=1).mean())
