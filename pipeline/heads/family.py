"""What every family of heads offers: candidates, a path over them on one fold, and a final fit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.arrays import Float32Array, Float64Array
from pipeline.heads.solvers.hyperplanes import Hyperplanes

Params = dict[str, Any]
Weights = Float32Array | None
"""Of the training rows, (n,); None if all weigh the same."""


class Step(NamedTuple):
    """One candidate on one fold.

    Parameters
    ----------
    predicted : (m,) int64, (m, K) bool or (m,) float64
        Class numbers, labels or numbers of the held-out rows.
    converged : bool
        Whether the solver stopped by its tolerance rather than by its iteration limit.
    probabilities : (m, K) float, optional
        Of the K classes of the training rows, for families that have them.
    scores : callable, optional
        For families without probabilities: returns the scores (m, K) of these classes, or (m,) or (m, 1) of the second
        of two, larger where likelier.
    """

    predicted: NDArray[Any]
    converged: bool
    probabilities: NDArray[np.floating[Any]] | None = None
    scores: Callable[[], NDArray[np.floating[Any]]] | None = None


class Fitted(NamedTuple):
    """A trained scikit-learn estimator, its final parameters, and whether its solver converged."""

    estimator: Any
    params: Params
    converged: bool


def of_both(scores: NDArray[np.floating[Any]]) -> Float64Array:
    """Return scores (m, K) of all classes, also if `scores`, (m,) or (m, 1), are those of the second of two."""
    scores = np.asarray(scores, np.float64).reshape(len(scores), -1)
    return np.hstack([-scores, scores]) if scores.shape[1] == 1 else scores


class Family(ABC):
    """One kind of head. An object of it keeps nothing of its fits.

    To add a head, write a subclass in a file of its own and enter it in `pipeline.heads.registry`.

    Attributes
    ----------
    linear : bool
        Whether the trained head has one hyperplane per class. Such heads may be trained on rows rotated onto their row
        space.
    probabilities : bool
        Whether it has probabilities, see `predict_proba`.
    weighted : bool
        Whether training rows may have different weights, which balancing the classes takes.
    fixed : dict
        Parameters to use if nothing can be validated, as with one row per class.
    most_rows : int or None
        The head is refused on more training rows than this.
    streams : bool
        Whether it also trains on rows that are read anew for each pass, see `StreamedRows`, because they are too many
        for the memory.
    memory : float
        Peak of the memory that a fit takes beside its training rows, in units of these.
    cost : float
        Seconds of a fit with its search, per training row and feature, for the time estimates of `compare`.
    device : str or None
        Where it trains on torch tensors, one fit after another; None for numpy arrays, several fits at a time.
    """

    linear: ClassVar[bool] = False
    probabilities: ClassVar[bool] = False
    weighted: ClassVar[bool] = False
    fixed: ClassVar[Params] = {}
    most_rows: ClassVar[int | None] = None
    streams: ClassVar[bool] = False
    memory: ClassVar[float] = 1.0
    cost: ClassVar[float] = 1e-6
    device: str | None = None

    def bytes_beside(self, n_rows: int, folds: int) -> int:
        """Return the bytes that choosing on so many folds at a time takes beside rows and scores."""
        return 0

    @abstractmethod
    def grid(self, n_rows: int) -> Sequence[Params]:
        """Return the candidates for at least `n_rows` training rows, the most regularised first."""

    @abstractmethod
    def path(
        self, grid: Sequence[Params], train: Float32Array, y: NDArray[Any], held: Float32Array, weight: Weights = None
    ) -> Iterator[Step]:
        """Fit the candidates in order on `train` (n, d) and `y` (n, ...), and predict `held` (m, d) with each."""

    @abstractmethod
    def fit(self, params: Params, train: Float32Array, y: NDArray[Any], weight: Weights = None) -> Fitted:
        """Train the final estimator on `train` (n, d) and `y` (n, ...)."""

    def predict_proba(self, estimator: Any, rows: Float32Array) -> Float64Array:
        """Return the probabilities (n, K) that a trained `estimator` gives to scaled rows (n, d), not calibrated."""
        return np.asarray(estimator.predict_proba(rows), np.float64)

    def scores(self, estimator: Any, rows: Float32Array) -> Float64Array:
        """Return scores (n, K) that a trained `estimator` gives to scaled rows (n, d): larger where likelier."""
        if self.probabilities:
            return self.predict_proba(estimator, rows)
        return of_both(estimator.decision_function(rows))

    def on_device(self, device: str) -> Family:
        """Return this family trained on torch tensors on `device`; unchanged if it only takes numpy arrays."""
        return self

    def hyperplanes(self, estimator: Any) -> Hyperplanes | None:
        """Return a trained `estimator` as one hyperplane per class, label or number; None if it has none."""
        return None
