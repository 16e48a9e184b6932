"""The directions along which rows spread most, and units of curvature along them.

The features of a network spread by orders of magnitude more along some directions than along others. So does the
curvature of a linear head's loss, which costs L-BFGS hundreds of steps. In units of that curvature it takes tens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.utils.extmath import randomized_svd

from pipeline.arrays import Float32Array, Float64Array

_DIRECTIONS = 64
_ROWS = 4096


@dataclass(frozen=True)
class Units:
    """A symmetric change of variables for weights whose last column is the intercept.

    Parameters
    ----------
    axes : (r, d) float64
        Orthonormal directions.
    along : (r,) or (k, r) float64
        Units of the coefficients along them, the same for all k hyperplanes or one row for each.
    rest : (1,) or (k, 1) float64
        Unit of the coefficients orthogonal to all of them.
    intercept : (1,) or (k, 1) float64
        Unit of the intercepts.
    """

    axes: Float64Array
    along: Float64Array
    rest: Float64Array
    intercept: Float64Array

    def apply(self, weights: Float64Array) -> Float64Array:
        """Convert `weights` (k, d + 1) from these units to those of the features."""
        given = weights[:, :-1]
        coefficients = self.rest * given + ((self.along - self.rest) * (given @ self.axes.T)) @ self.axes
        return np.hstack([coefficients, self.intercept * weights[:, -1:]])

    def inverse(self) -> Units:
        """Return the units that convert in the other direction."""
        return Units(self.axes, 1 / self.along, 1 / self.rest, 1 / self.intercept)


@dataclass(frozen=True)
class Spectrum:
    """The directions along which rows spread most, approximately.

    Parameters
    ----------
    mean : (d,) float64
        Mean of the rows.
    axes : (r, d) float64
        Leading principal axes.
    spread : (r,) float64
        Variances along them, the largest first.
    """

    mean: Float64Array
    axes: Float64Array
    spread: Float64Array

    def units(self, curvature: Float64Array, penalty: float) -> Units:
        """Return units in which a loss, plus its penalty, has curvature 1.

        `curvature` per unit of variance is that of all hyperplanes (1,), or of each (k, 1).
        """
        along = 1 / np.sqrt(curvature * self.spread + penalty)
        return Units(self.axes, along, along[..., -1:], 1 / np.sqrt(curvature + penalty))


def find_spectrum(rows: Float32Array) -> Spectrum:
    """Estimate the spectrum of `rows` (n, d) from at most 4,096 of them, evenly spaced.

    A poor estimate makes the optimisation slower, not less exact. If rows or features are few, only half as many
    directions are computed, because in float32 the last ones are rounding noise.
    """
    sample = np.asarray(rows[:: -(-len(rows) // _ROWS)])
    mean = sample.mean(axis=0, dtype=np.float64)
    count = max(1, min(_DIRECTIONS, min(sample.shape) // 2))
    _, sizes, axes = randomized_svd(sample - mean.astype(np.float32), count, n_iter=2, random_state=0)
    return Spectrum(mean, axes.astype(np.float64), sizes.astype(np.float64) ** 2 / len(sample))
