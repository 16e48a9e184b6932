"""SVM with a Gaussian kernel; C and gamma are searched on distances that are computed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import ClassVar

import numpy as np
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.svm import SVC

from pipeline.arrays import Float32Array, IntArray
from pipeline.heads.family import Family, Fitted, Params, Step, Weights

_C = tuple(10.0**exponent for exponent in range(-1, 4))
_GAMMA = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
"""In units of scikit-learn's ``"scale"``: one over the number of features times their variance."""


class RbfSvm(Family):
    """Scikit-learn's `SVC` with a Gaussian kernel; ties among the votes of class pairs go to the larger margins."""

    weighted = True
    fixed: ClassVar[Params] = {"C": 1.0, "gamma": 1.0}
    most_rows = 8_000  # two tables of all pairs in float64: about 1 GB in each worker
    cost = 3e-6

    def grid(self, n_rows: int) -> Sequence[Params]:
        """Return 5 values of C times 6 of gamma, the latter relative to ``"scale"``."""
        return [{"C": c, "gamma": gamma} for c in _C for gamma in _GAMMA]

    def path(
        self, grid: Sequence[Params], train: Float32Array, y: IntArray, held: Float32Array, weight: Weights = None
    ) -> Iterator[Step]:
        """Yield a `Step` for each candidate."""
        among = euclidean_distances(train.astype(np.float64), squared=True)
        across = euclidean_distances(held.astype(np.float64), train.astype(np.float64), squared=True)
        scale = kernel_scale(train)
        kernel = np.empty_like(among)
        for params in grid:
            gamma = scale * params["gamma"]
            np.exp(np.multiply(among, -gamma, out=kernel), out=kernel)
            model = SVC(C=params["C"], kernel="precomputed", break_ties=True).fit(kernel, y, weight)
            unseen = np.exp(-gamma * across)
            yield Step(model.predict(unseen), converged=True, scores=partial(model.decision_function, unseen))

    def fit(self, params: Params, train: Float32Array, y: IntArray, weight: Weights = None) -> Fitted:
        """Train an `SVC`; the gamma of the returned parameters is absolute."""
        absolute = {"C": params["C"], "gamma": kernel_scale(train) * params["gamma"]}
        return Fitted(SVC(kernel="rbf", break_ties=True, **absolute).fit(train, y, weight), absolute, converged=True)


def kernel_scale(train: Float32Array) -> float:
    """Return what scikit-learn calls gamma ``"scale"``: one over the number of features times their variance."""
    variance = float(train.var(dtype=np.float64))
    return 1 / (train.shape[1] * variance) if variance > 0 else 1.0
