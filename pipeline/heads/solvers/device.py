"""Training rows on a device: they are copied there once, and only products with them come back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np

from pipeline.arrays import Float32Array
from pipeline.errors import FitError

T = TypeVar("T")
Task = tuple[Callable[..., T], tuple[Any, ...], dict[str, Any]]
"""A call as `joblib.delayed` stores it."""


class DeviceRows:
    """A matrix on a device that float32 numpy arrays multiply from either side, like a numpy matrix.

    Parameters
    ----------
    rows : (n, d) float32
    device : str
        As torch names it.
    """

    __array_ufunc__ = None  # makes numpy leave products to this class

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


def run_one_by_one(tasks: Iterable[Task[T]]) -> Iterator[T]:
    """Run each task when its result is asked for, and yield the result.

    Raises
    ------
    FitError
        If the rows of a task do not fit into the memory of the device.
    """
    for function, arguments, options in tasks:
        import torch

        try:
            result = function(*arguments, **options)
        except torch.OutOfMemoryError as error:
            raise FitError("the rows of a fit do not fit into the memory of the device; use device 'cpu'") from error
        yield result
