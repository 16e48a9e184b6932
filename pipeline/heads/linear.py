"""The base of linear heads with an l2 penalty, whose one parameter is its strength."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from pipeline.heads.family import Family, Params
from pipeline.heads.solvers.hyperplanes import Hyperplanes, of_each_class

C_GRID = tuple(float(c) for c in np.logspace(-6, 5, 45))
"""45 values from 1e-6 to 1e5, evenly spaced in the logarithm (Kornblith et al. 2019, "Do better ImageNet models
transfer better?")."""


class LinearFamily(Family):
    """A head whose scikit-learn estimator has ``coef_`` and ``intercept_``; by default its parameter is C."""

    linear = True
    weighted = True
    fixed: ClassVar[Params] = {"C": 1.0}

    def grid(self, n_rows: int) -> Sequence[Params]:
        """Return the 45 values of C."""
        return [{"C": c} for c in C_GRID]

    def hyperplanes(self, estimator: Any) -> Hyperplanes:
        """Return coefficients and intercepts, for two classes those of the second beside zeros."""
        return of_each_class(estimator.coef_, estimator.intercept_)


def decades(c: float, most: float = 1) -> list[float]:
    """Return `c` alone if it is at most `most`, otherwise values that rise to it by factors of ten from below that."""
    below = max(math.ceil(math.log10(c / most)), 0)
    return [c / 10**power for power in range(below, -1, -1)]
