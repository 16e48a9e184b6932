"""How accurate a method would be with more labels, from its accuracies with fewer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.arrays import Float64Array
from pipeline.evaluation.intervals import CONFIDENCE

FEWEST_POINTS = 3
"""A curve needs accuracies at so many numbers of labels to be drawn further."""

_DRAWS = 2000
_MISFIT = 0.01  # how far a real curve is from the power law through its last point, and again for each doubling from it
_RATES = np.geomspace(0.05, 1.5, 25)  # exponents that are tried
_FLOORS = np.linspace(0, 1, 21) ** 2  # errors that any number of labels leaves, as shares of the smallest error seen


@dataclass(frozen=True, eq=False)
class LabelCurve:
    """Accuracies of one method at k numbers of labels a class, ascending.

    Parameters
    ----------
    labels : (k,) float64
    accuracies : (k,) float64
        Means over seeds.
    errors : (k,) float64
        Standard errors of these means, for other test rows and other training draws.
    """

    labels: Float64Array
    accuracies: Float64Array
    errors: Float64Array

    def draws(self, labels: Sequence[float], seed: int = 0) -> Float64Array:
        """Return accuracies (draws, m) that this curve may reach with `labels` (m,), as likely as they are drawn.

        The error is taken for ``floor + scale * labels ** -rate`` (a power law; Hestness et al. 2017). Each floor and
        rate of a grid, with the scale that fits best, is drawn as often as the accuracies seen are likely under it.
        The last accuracies count most, because real curves are power laws only in part.
        """
        seen, spread = 1 - self.accuracies, self._spread(self.labels, self.errors)
        rates, shares = (grid.ravel() for grid in np.meshgrid(_RATES, _FLOORS))
        floors = shares * seen.min()
        powers = self.labels[None] ** -rates[:, None]
        weights = 1 / spread**2
        above = seen - floors[:, None]
        scales = np.maximum((weights * powers * above).sum(axis=1) / (weights * powers**2).sum(axis=1), 0)
        misfit = (weights * (above - scales[:, None] * powers) ** 2).sum(axis=1)
        likely = np.exp(-(misfit - misfit.min()) / 2)
        rng = np.random.default_rng(seed)
        drawn = rng.choice(len(rates), _DRAWS, p=likely / likely.sum())
        errors = floors[drawn, None] + scales[drawn, None] * np.asarray(labels) ** -rates[drawn, None]
        noise = self._spread(np.asarray(labels), self.errors[-1]) * rng.standard_normal((_DRAWS, 1))
        return np.asarray(np.clip(1 - errors + noise, 0, 1))

    def _spread(self, labels: Float64Array, errors: Float64Array | float) -> Float64Array:
        """Return the standard deviations of accuracies around the power law, from noise and from misfit."""
        doublings = np.abs(np.log2(labels / self.labels[-1]))
        return np.asarray(np.hypot(errors, _MISFIT * (1 + doublings)))

    def interval(self, labels: float, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """Return between which accuracies this method would be with so many labels a class."""
        tail = (1 - confidence) / 2
        low, high = np.quantile(self.draws([labels]), [tail, 1 - tail])
        return float(low), float(high)
