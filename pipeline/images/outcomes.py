"""What can become of a row on its way through the loader; digests are blake2b-128 of the file's bytes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Decoded(NamedTuple):
    """Pixels, uint8 (h, w, 3) for each preprocessing."""

    row: int
    pixels: tuple[np.ndarray, ...]
    digest: bytes


class Duplicate(NamedTuple):
    """A row whose bytes equal those of the row `of`, which stands before it and was decoded."""

    row: int
    of: int
    digest: bytes


class Failure(NamedTuple):
    """A row that could not be decoded, and why in a few words; no digest where another attempt may succeed."""

    row: int
    reason: str
    digest: bytes | None


class Known(NamedTuple):
    """A row whose features the caller has already, by its digest."""

    row: int
    digest: bytes


Outcome = Decoded | Duplicate | Failure | Known
