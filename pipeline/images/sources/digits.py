"""scikit-learn's 1,797 handwritten digits as a source: 8×8 pixels, 17 grey levels, ten classes, no download."""

from __future__ import annotations

import numpy as np

from pipeline.images.sources.items import ImageSource, Item, build_source


def open_digits() -> ImageSource:
    """Return the digits, labelled by what they show, without splits or groups.

    Each image is a binary PGM whose white is 16, the brightest value in the set. The first uri is ``digits/0000``.
    """
    from sklearn.datasets import load_digits  # late: importing scikit-learn takes longer than all of this package

    data = load_digits()
    encoded = [_pgm(image) for image in data.images.astype(np.uint8)]
    labelled = [
        (Item(f"digits/{number:04d}", size=len(encoded[number])), str(label))
        for number, label in enumerate(data.target.tolist())
    ]

    def read(item: Item) -> bytes:
        return encoded[int(item.uri.removeprefix("digits/"))]

    return build_source("digits", "digits", labelled, read)


def _pgm(image: np.ndarray) -> bytes:  # (8, 8) uint8, 0 to 16
    height, width = image.shape
    return f"P5\n{width} {height}\n16\n".encode() + image.tobytes()
