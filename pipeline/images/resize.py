"""A picture becomes the network's input: torchvision's `Resize` and `CenterCrop`, antialiased, in uint8.

torch's own uint8 resize, which is the same arithmetic as Pillow's within 2 grey levels and several times as fast, does
the two usual filters. Pillow does the others, the fractional boxes of reduced JPEGs, and pictures so long and thin that
the whole would be many times the crop, as one resize of what the crop keeps: there the box is torchvision's integer
resized size and crop offset mapped back to the picture (a fractional one would shift everything), and the columns come
first, as they do in the whole picture.
Scaling to floats and normalising happen later, on the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipeline.images.augment import changed, parse_augment, random_box, view_generator
from pipeline.images.decode import Picture, decode
from pipeline.spec import Preprocessing, View

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

_TORCH_FILTERS = ("bilinear", "bicubic")

_WHOLE_LIMIT = 16
"""Times the pixels of the crop that a resized picture may have to be resized whole."""

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
    return prepare_all(data, [preprocessing])[0]


def prepare_all(data: bytes, preprocessings: Sequence[Preprocessing]) -> tuple[np.ndarray, ...]:
    """Return what `prepare` gives for each of `preprocessings`, decoded once for those that bear the same reduction."""
    pictures = {floor: decode(data, floor) for floor in {jpeg_floor(wanted) for wanted in preprocessings}}
    return tuple(_prepared(pictures[jpeg_floor(wanted)], wanted, data) for wanted in preprocessings)


def _prepared(picture: Picture, preprocessing: Preprocessing, data: bytes) -> np.ndarray:
    if isinstance(preprocessing, View):
        return _augmented(picture, preprocessing, view_generator(preprocessing, data))
    return resize_and_crop(picture, preprocessing)


def _augmented(picture: Picture, view: View, generator: np.random.Generator) -> np.ndarray:
    """Return an augmented view; a random crop takes the place of resize and centre crop."""
    parts = parse_augment(view.augment)
    if "crop" in parts:
        box = random_box(picture.box, generator)
        height, width = view.size
        image = picture.image.resize((width, height), _FILTERS[view.interpolation], box)
    else:
        image = Image.fromarray(resize_and_crop(picture, view))
    return np.array(changed(image, parts, generator))


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
    small = resized_height * resized_width <= _WHOLE_LIMIT * height * width
    if small and preprocessing.interpolation in _TORCH_FILTERS and picture.box == (0, 0, *picture.image.size):
        whole = _resize_whole(picture.image, (resized_height, resized_width), preprocessing.interpolation)
        return _centre(whole, x, y, preprocessing.size)
    box = (x.low, y.low, min(x.high, picture.image.width), min(y.high, picture.image.height))  # rounding may exceed it
    resized = _resize(picture.image, (x.stop - x.start, y.stop - y.start), _FILTERS[preprocessing.interpolation], box)
    return _centre(np.asarray(resized), x, y, preprocessing.size)


def _resize_whole(image: Image.Image, size: tuple[int, int], filter_name: str) -> np.ndarray:
    """Return the picture at `size` (height, width), as uint8 (height, width, 3)."""
    from torch import from_numpy
    from torch.nn.functional import interpolate

    channels_last = from_numpy(np.array(image)).unsqueeze(0).permute(0, 3, 1, 2)
    resized = interpolate(channels_last, size=size, mode=filter_name, antialias=True)
    return resized.permute(0, 2, 3, 1)[0].numpy()


def _centre(resized: np.ndarray, x: Span, y: Span, size: tuple[int, int]) -> np.ndarray:
    """Cut the centre out of a resized picture that is too large, or put one that is too small on black, by axis."""
    top, left = (max(round((length - crop) / 2), 0) for length, crop in zip(resized.shape[:2], size, strict=True))
    part = resized[top : top + y.stop - y.start, left : left + x.stop - x.start]
    if part.shape[:2] == size:
        return part.copy()
    pixels = np.zeros((*size, 3), np.uint8)
    pixels[y.start : y.stop, x.start : x.stop] = part
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
