"""Training rows on a device: they are copied there once, and only products with them come back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np

from pipeline.arrays import Float32Array, FloatArray
from pipeline.errors import FitError

T = TypeVar("T")
Task = tuple[Callable[..., T], tuple[Any, ...], dict[str, Any]]
"""A call as `joblib.delayed` stores it."""


class DeviceRows:
    """A matrix on a device that numpy arrays multiply from either side, in their dtype.

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

    def __matmul__(self, right: FloatArray) -> FloatArray:
        moved = self._moved(right)
        return np.asarray((self._rows.to(moved.dtype) @ moved).cpu().numpy())

    def __rmatmul__(self, left: FloatArray) -> FloatArray:
        moved = self._moved(left)
        return np.asarray((moved @ self._rows.to(moved.dtype)).cpu().numpy())

    def _moved(self, array: FloatArray) -> Any:
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
