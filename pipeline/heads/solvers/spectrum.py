"""The directions along which rows spread most, and units of curvature along them.

Features of a network spread by orders of magnitude more along some directions than along others, and the loss of a
linear head curves accordingly, which costs L-BFGS hundreds of steps. Measured in units of that curvature, tens do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from sklearn.utils.extmath import randomized_svd

from pipeline.arrays import Float32Array, Float64Array

_DIRECTIONS = 64
_ROWS = 4096


@dataclass(frozen=True)
class Units:
    """A change of variables for coefficients, with an intercept in the last column; symmetric.

    Parameters
    ----------
    axes : (r, d) float64
        Orthonormal directions.
    along : (r,) float64
        The units of coefficients along them.
    rest : float
        The unit of what is orthogonal to all of them.
    intercept : float
        The unit of intercepts.
    """

    axes: Float64Array
    along: Float64Array
    rest: float
    intercept: float

    def apply(self, weights: Float64Array) -> Float64Array:
        """Return `weights` (k, d + 1), given in these units, in those of the features."""
        given = weights[:, :-1]
        coefficients = self.rest * given + ((self.along - self.rest) * (given @ self.axes.T)) @ self.axes
        return np.hstack([coefficients, self.intercept * weights[:, -1:]])

    def inverse(self) -> Units:
        """Return the way back."""
        return Units(self.axes, 1 / self.along, 1 / self.rest, 1 / self.intercept)


@dataclass(frozen=True)
class Spectrum:
    """Where rows spread most.

    Parameters
    ----------
    mean : (d,) float64
        About the mean of the rows.
    axes : (r, d) float64
        About the leading principal axes.
    spread : (r,) float64
        About the variances along them, falling.
    """

    mean: Float64Array
    axes: Float64Array
    spread: Float64Array

    def units(self, curvature: float, penalty: float) -> Units:
        """Return units in which a loss that curves so much for each unit of variance, and its penalty, curve by 1."""
        along = 1 / np.sqrt(curvature * self.spread + penalty)
        return Units(self.axes, along, float(along[-1]), 1 / math.sqrt(curvature + penalty))


def find_spectrum(rows: Float32Array) -> Spectrum:
    """Return the spectrum of `rows` (n, d), of at most some thousand of them, evenly chosen.

    What it is used for is exact whatever it finds, only slower where that is far off. Of a few features it takes half
    the directions, for float32 does not tell the last ones from rounding.
    """
    sample = rows[:: -(-len(rows) // _ROWS)]
    mean = sample.mean(axis=0, dtype=np.float64)
    count = max(1, min(_DIRECTIONS, min(sample.shape) // 2))
    _, sizes, axes = randomized_svd(sample - mean.astype(np.float32), count, n_iter=2, random_state=0)
    return Spectrum(mean, axes.astype(np.float64), sizes.astype(np.float64) ** 2 / len(sample))
