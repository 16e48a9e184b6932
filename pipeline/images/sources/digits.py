"""scikit-learn's 1,797 handwritten digits as a source: 8×8 pixels, 17 grey levels, ten classes, no download."""

from __future__ import annotations

import numpy as np

from pipeline.images.sources.items import Entry, ImageSource, Item, build_source

DIGITS = "digits"
"""The word that stands for this source wherever a path is expected."""


def open_digits() -> ImageSource:
    """Return the digits, labelled by what they show, without splits or groups.

    Each image is a binary PGM whose white is 16, the brightest value in the set; uris are ``digits/0000`` onwards.
    """
    from sklearn.datasets import load_digits  # late: importing scikit-learn costs more than the rest of this package

    data = load_digits()
    encoded = [_pgm(image) for image in data.images.astype(np.uint8)]
    entries = [
        Entry(f"{DIGITS}/{number:04d}", str(label), "", "", len(encoded[number]), 0)
        for number, label in enumerate(data.target.tolist())
    ]

    def read(item: Item) -> bytes:
        return encoded[int(item.uri.removeprefix(f"{DIGITS}/"))]

    return build_source(DIGITS, DIGITS, entries, read)


def _pgm(image: np.ndarray) -> bytes:  # (8, 8) uint8, 0 to 16
    height, width = image.shape
    return f"P5\n{width} {height}\n16\n".encode() + image.tobytes()
