"""A picture becomes the network's input: torchvision's `Resize` and `CenterCrop` as one antialiased Pillow resize.

Resizing only what the crop keeps is faster and gives the same pixels within 2 grey levels, provided that the box is
torchvision's integer resized size and crop offset mapped back to the picture (a fractional box would shift everything),
and that the columns are resized first, as they are in the whole picture.
Scaling to floats and normalising happen later, on the device.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipeline.images.decode import Picture, decode
from pipeline.spec import Preprocessing

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

_REACH = 3
"""Rows, in those of the output, that the widest filter (Lanczos) reads beyond the box."""


class Span(NamedTuple):
    """One axis of the crop: pixels ``start`` to ``stop`` of the output show `low` to `high` of the picture's box."""

    start: int
    stop: int
    low: float
    high: float


def prepare(data: bytes, preprocessing: Preprocessing) -> np.ndarray:
    """Decode an image file's bytes and return the network's input, uint8 of shape (height, width, 3).

    Raises
    ------
    UnreadableImageError
        With a short reason; see `pipeline.images.decode.decode`.
    """
    return resize_and_crop(decode(data, jpeg_floor(preprocessing)), preprocessing)


def jpeg_floor(preprocessing: Preprocessing) -> int:
    """Return the pixels below which a reduced JPEG decode may not go: twice the resize size of the shorter side."""
    resize = preprocessing.resize
    return 2 * (resize if isinstance(resize, int) else max(resize))


def resize_and_crop(picture: Picture, preprocessing: Preprocessing) -> np.ndarray:
    """Resize a picture, crop its centre, and return uint8 pixels of shape (height, width, 3).

    An integer resize sets the shorter side and keeps the aspect ratio, a pair squashes. Where the resized picture is
    smaller than the crop it stands in the middle on black, as with torchvision's `CenterCrop`.
    """
    (height, width), (full_width, full_height) = preprocessing.size, picture.size
    resized_height, resized_width = resized_size(full_height, full_width, preprocessing.resize)
    left, top, right, bottom = picture.box
    x = _span(left, right, resized_width, width)
    y = _span(top, bottom, resized_height, height)
    box = (x.low, y.low, min(x.high, picture.image.width), min(y.high, picture.image.height))  # rounding may exceed it
    resized = _resize(picture.image, (x.stop - x.start, y.stop - y.start), _FILTERS[preprocessing.interpolation], box)
    if resized.size == (width, height):
        return np.array(resized)
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[y.start : y.stop, x.start : x.stop] = np.asarray(resized)
    return pixels


def _resize(
    image: Image.Image, size: tuple[int, int], resampling: Image.Resampling, box: tuple[float, float, float, float]
) -> Image.Image:
    """Return the part of `image` in `box` at `size`, the width resized before the height.

    Between the two passes values are rounded and clipped, so their order shows at edges: by 34 levels with Lanczos.
    Left to itself Pillow may take the other order for a part than for the whole.
    """
    left, top, right, bottom = box
    if box == (0, 0, *image.size):
        return image.resize(size, resampling)
    reach = _REACH * max((bottom - top) / size[1], 1) + 1
    first, last = max(math.floor(top - reach), 0), min(math.ceil(bottom + reach), image.height)
    rows = image.crop((0, first, image.width, last))
    columns = rows.resize((size[0], rows.height), resampling, box=(left, 0, right, rows.height))
    return columns.resize(size, resampling, box=(0, top - first, size[0], bottom - first))


def resized_size(height: int, width: int, resize: int | tuple[int, int]) -> tuple[int, int]:
    """Return the height and width that torchvision's `Resize(resize)` gives a picture."""
    if not isinstance(resize, int):
        return resize
    if width <= height:
        return int(resize * height / width), resize
    return resize, int(resize * width / height)


def _span(low: float, high: float, resized: int, crop: int) -> Span:
    """Return the centre `crop` of an axis that maps ``low`` to ``high`` onto `resized` pixels."""
    if crop > resized:
        start = (crop - resized) // 2
        return Span(start, start + resized, low, high)
    offset = round((resized - crop) / 2)  # halves to even, as torchvision
    scale = (high - low) / resized
    return Span(0, crop, low + offset * scale, low + (offset + crop) * scale)
