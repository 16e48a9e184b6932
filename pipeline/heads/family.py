"""What every family of heads offers: candidates, their path over a fold, and a final fit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.arrays import Float32Array, IntArray

Params = dict[str, Any]


class Step(NamedTuple):
    """One candidate on one fold.

    Parameters
    ----------
    predicted : (m,) int64
        Labels of the held-out rows.
    converged : bool
        The solver stopped by its tolerance, not by its iteration limit.
    probabilities : (m, K) float, optional
        Of the K classes of the training rows, for families that have them.
    """

    predicted: IntArray
    converged: bool
    probabilities: NDArray[np.floating[Any]] | None = None


class Fitted(NamedTuple):
    """A trained scikit-learn classifier, the parameters it ended up with, and whether its solver converged."""

    estimator: Any
    params: Params
    converged: bool


class Family(ABC):
    """One kind of head; an object that keeps nothing of its fits.

    Attributes
    ----------
    linear : bool
        Whether the trained head is one hyperplane a class: such heads may be trained on rows rotated onto their span.
    probabilities : bool
        Whether the estimator's `predict_proba` means probabilities.
    weighted : bool
        Whether training rows may weigh differently.
    fixed : dict
        Parameters where nothing is left to validate on, as with one row a class.
    most_rows : int or None
        Above so many training rows the head is refused.
    device : str or None
        Where it trains on torch tensors, one fit after another; None for numpy arrays, several fits at a time.
    """

    linear: ClassVar[bool] = False
    probabilities: ClassVar[bool] = False
    weighted: ClassVar[bool] = False
    fixed: ClassVar[Params] = {}
    most_rows: ClassVar[int | None] = None
    device: str | None = None

    @abstractmethod
    def grid(self, n_rows: int) -> Sequence[Params]:
        """Return the candidates for at least `n_rows` training rows, the most regularised first."""

    @abstractmethod
    def path(
        self,
        grid: Sequence[Params],
        train: Float32Array,
        y: IntArray,
        held: Float32Array,
        weight: Float32Array | None = None,
    ) -> Iterator[Step]:
        """Fit the candidates in order on `train` (n, d), `y` and `weight` (n,), and predict `held` (m, d) with each."""

    @abstractmethod
    def fit(self, params: Params, train: Float32Array, y: IntArray, weight: Float32Array | None = None) -> Fitted:
        """Train the final classifier on `train` (n, d), `y` and `weight` (n,)."""
