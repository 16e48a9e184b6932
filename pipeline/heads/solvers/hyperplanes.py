"""What heads of one hyperplane a class share: the grid of C, labels as signs, and signs as labels.

Regularisation is searched on the grid of Kornblith et al. (2019, "Do better ImageNet models transfer better?"): 45
values of C from 1e-6 to 1e5, evenly spaced in the logarithm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import numpy as np
from numpy.typing import NDArray

from pipeline.arrays import Float32Array, IntArray
from pipeline.heads.family import Family, Params

C_GRID = tuple(float(c) for c in np.logspace(-6, 5, 45))


class OverC(Family):
    """A linear head whose one parameter is C."""

    linear = True
    weighted = True
    fixed: ClassVar[Params] = {"C": 1.0}

    def grid(self, n_rows: int) -> Sequence[Params]:
        """Return the 45 values of C."""
        return [{"C": c} for c in C_GRID]


def one_against_rest(y: IntArray) -> tuple[IntArray, Float32Array]:
    """Return the classes and their signs: (n, K) of -1 and 1, a single column for two classes."""
    classes = np.unique(y)
    columns = classes[1:] if len(classes) == 2 else classes
    return classes, np.where(y[:, None] == columns, np.float32(1), np.float32(-1))


def choose(classes: IntArray, scores: NDArray[np.floating[Any]]) -> IntArray:
    """Return the class of the largest score of each row (m, K), by the sign where there is one column."""
    best = (scores[:, 0] > 0).astype(np.int64) if scores.shape[1] == 1 else scores.argmax(axis=1)
    return cast("IntArray", classes[best])
