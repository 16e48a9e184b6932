"""Batches of one fixed size, for what is compiled for a shape."""

from __future__ import annotations

import numpy as np


def padded(pixels: np.ndarray, batch_size: int) -> np.ndarray:
    """Return pixels (k, h, w, 3) with black images behind them, (batch_size, h, w, 3)."""
    if len(pixels) == batch_size:
        return pixels
    full = np.zeros((batch_size, *pixels.shape[1:]), np.uint8)
    full[: len(pixels)] = pixels
    return full
