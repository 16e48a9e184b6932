"""Training on torch tensors through scikit-learn's array API: rows go to a device once, what was learnt comes back.

scikit-learn hands weights to scipy's L-BFGS and gets gradients from tensors, so a warm start, weights of rows and the
report of convergence are what they are on numpy arrays. Sums run in another order and in float32, so that weights agree
to about four digits, and more loosely at large C, where the loss is flat.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from sklearn import config_context

from pipeline.errors import FitError

Outcome = TypeVar("Outcome")
Task = tuple[Callable[..., Outcome], tuple[Any, ...], dict[str, Any]]
"""As `joblib.delayed` makes them."""

_SCIPY = "SCIPY_ARRAY_API"
_LEARNT = ("coef_", "intercept_", "classes_", "n_iter_")


def to_device(rows: NDArray[np.float32], device: str) -> Any:
    """Return a copy of `rows` (n, d) as a tensor on `device`."""
    import torch

    return torch.tensor(rows, device=device)


def to_host(values: Any) -> NDArray[Any]:
    """Return a tensor as an array, and an array as it is."""
    return values if isinstance(values, np.ndarray) else np.asarray(values.cpu().numpy())


def bring_back(model: Any) -> None:
    """Make what a linear classifier has learnt numpy arrays, so that it predicts, is saved and is loaded anywhere."""
    for name in _LEARNT:
        setattr(model, name, to_host(getattr(model, name)))


def run_one_by_one(tasks: Iterable[Task[Outcome]]) -> Iterator[Outcome]:
    """Yield what each task returns; tensors may be given to scikit-learn in it.

    Raises
    ------
    FitError
        If the device has no memory for the rows of a task.
    """
    for function, arguments, options in tasks:
        import torch

        try:
            with array_api():
                outcome = function(*arguments, **options)
        except torch.OutOfMemoryError as error:
            raise FitError("the device has no memory for the rows of a fit; use --device cpu") from error
        yield outcome


@contextmanager
def array_api() -> Iterator[None]:
    """Let scikit-learn compute on tensors.

    It insists on a variable that, set before scipy is imported, makes scipy take tensors too. Logistic regression gives
    scipy numpy arrays alone, so the variable is set for scikit-learn's sake, and scipy stays as it was imported.
    """
    before = os.environ.get(_SCIPY)
    os.environ[_SCIPY] = "1"
    try:
        with config_context(array_api_dispatch=True):
            yield
    finally:
        if before is None:
            del os.environ[_SCIPY]
        else:
            os.environ[_SCIPY] = before
