"""Training rows on a device: they go there once, and each product with them comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np

from pipeline.arrays import Float32Array
from pipeline.errors import FitError

Outcome = TypeVar("Outcome")
Task = tuple[Callable[..., Outcome], tuple[Any, ...], dict[str, Any]]
"""As `joblib.delayed` makes them."""


class DeviceRows:
    """A matrix on a device, multiplied from either side by float32 numpy arrays, as a numpy matrix would be.

    Parameters
    ----------
    rows : (n, d) float32
    device : str
        As torch names it.
    """

    __array_ufunc__ = None  # numpy leaves products to this class

    def __init__(self, rows: Float32Array, device: str) -> None:
        import torch

        self._rows = torch.tensor(rows, device=device)
        self._torch = torch

    def __matmul__(self, right: Float32Array) -> Float32Array:
        return np.asarray((self._rows @ self._moved(right)).cpu().numpy())

    def __rmatmul__(self, left: Float32Array) -> Float32Array:
        return np.asarray((self._moved(left) @ self._rows).cpu().numpy())

    def _moved(self, array: Float32Array) -> Any:
        return self._torch.from_numpy(array).to(self._rows.device)


def run_one_by_one(tasks: Iterable[Task[Outcome]]) -> Iterator[Outcome]:
    """Yield what each task returns.

    Raises
    ------
    FitError
        If the device has no memory for the rows of a task.
    """
    for function, arguments, options in tasks:
        import torch

        try:
            outcome = function(*arguments, **options)
        except torch.OutOfMemoryError as error:
            raise FitError("the device has no memory for the rows of a fit; use device 'cpu'") from error
        yield outcome
