"""float32 on CUDA that is float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def exact_float32() -> Iterator[None]:
    """Compute float32 convolutions in float32; also a decorator.

    By default cuDNN rounds their inputs to TF32, which has 10 bits of mantissa instead of 23. Matrix products are exact
    unless the caller has set torch otherwise.
    """
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]  # set at import
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision = before
