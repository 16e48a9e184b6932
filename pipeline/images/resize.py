"""A picture becomes the network's input: torchvision's `Resize` and `CenterCrop`, antialiased, in uint8.

torch's own uint8 resize does the two usual filters: it computes the same as Pillow within 2 grey levels, several times
as fast. Pillow does the rest: other filters, the fractional boxes of reduced JPEGs, and pictures so long and thin that
the whole resized picture would be many times the crop. There one resize makes only what the crop keeps. Its box is
torchvision's integer resized size and crop offset mapped back to the picture (a fractional offset would shift
everything), and its width is resized first, as in the whole picture.

Scaling to floats and normalising happen later, on the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from pipeline.images.augment import changed, parse_augment, random_box, view_generator
from pipeline.images.decode import Picture, as_array, decode
from pipeline.spec import INTERPOLATIONS, Preprocessing, View

_FILTERS = {name: Image.Resampling[name.upper()] for name in INTERPOLATIONS}

_TORCH_FILTERS = ("bilinear", "bicubic")

_WHOLE_LIMIT = 16
"""A picture is resized whole if that gives at most this many times the pixels of the crop."""

_REACH = 3
"""Rows of the output that the widest filter (Lanczos) reads beyond the box."""


class CropAxis(NamedTuple):
    """One axis of a crop: pixels `start` to `stop` of the output show `low` to `high` of the picture, in its pixels."""

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
    return prepare_all(data, [preprocessing]).pixels[0]


class PreparedImage(NamedTuple):
    """One image as several networks' inputs, and whether it lost most grey levels (`decode.FEW_LEVELS`)."""

    pixels: tuple[np.ndarray, ...]
    few_levels: bool


def prepare_all(data: bytes, preprocessings: Sequence[Preprocessing]) -> PreparedImage:
    """Return what `prepare` gives for each of `preprocessings`.

    The bytes are decoded once for each JPEG reduction and white level. Preprocessings of equal geometry share one
    array.
    """
    pictures: dict[tuple[int, int | None], Picture] = {}
    prepared: dict[tuple[Any, ...], np.ndarray] = {}
    for preprocessing in preprocessings:
        if preprocessing.geometry not in prepared:
            how = jpeg_floor(preprocessing), preprocessing.white
            if how not in pictures:
                pictures[how] = decode(data, *how)
            prepared[preprocessing.geometry] = _prepared(pictures[how], preprocessing, data)
    pixels = tuple(prepared[preprocessing.geometry] for preprocessing in preprocessings)
    return PreparedImage(pixels, any(picture.few_levels for picture in pictures.values()))


def _prepared(picture: Picture, preprocessing: Preprocessing, data: bytes) -> np.ndarray:
    if isinstance(preprocessing, View):
        return _augmented(picture, preprocessing, view_generator(preprocessing, data))
    return resize_and_crop(picture, preprocessing)


def _augmented(picture: Picture, view: View, generator: np.random.Generator) -> np.ndarray:
    """Return an augmented view; a random crop replaces resize and centre crop."""
    parts = parse_augment(view.augment)
    if "crop" in parts:
        box = random_box(picture.box, generator)
        height, width = view.size
        image = picture.image.resize((width, height), _FILTERS[view.interpolation], box)
    else:
        image = Image.fromarray(resize_and_crop(picture, view))
    return np.array(changed(image, parts, generator))


def jpeg_floor(preprocessing: Preprocessing) -> int:
    """Return the least length of the shorter side, in pixels, after a reduced JPEG decode: twice that of the resize."""
    return 2 * max(_box(preprocessing))


def resize_and_crop(picture: Picture, preprocessing: Preprocessing) -> np.ndarray:
    """Resize a picture, crop its centre, and return uint8 pixels of shape (height, width, 3).

    An integer resize keeps the aspect ratio and sets the shorter side or, where the crop is no square, makes the
    picture just cover the crop and its margin; a pair sets both sides. If the resized picture is smaller than the crop,
    it is centred on black, as by torchvision's `CenterCrop`.
    """
    (height, width), (full_width, full_height) = preprocessing.size, picture.size
    resized_height, resized_width = resized_size(full_height, full_width, preprocessing)
    left, top, right, bottom = picture.box
    x = _crop_axis(left, right, resized_width, width)
    y = _crop_axis(top, bottom, resized_height, height)
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

    channels_last = from_numpy(as_array(image)).unsqueeze(0).permute(0, 3, 1, 2)
    try:
        resized = interpolate(channels_last, size=size, mode=filter_name, antialias=True)
    except RuntimeError as error:  # torch's word for a lack of memory, the only thing that can fail here
        raise MemoryError(str(error)) from error
    return resized.permute(0, 2, 3, 1)[0].numpy()


def _centre(resized: np.ndarray, x: CropAxis, y: CropAxis, size: tuple[int, int]) -> np.ndarray:
    """Along each axis, cut out the centre of a resized picture that is too large, or centre a small one on black."""
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
    """Return the part of `image` in `box`, resized to `size`: the width first, then the height.

    Values are rounded and clipped between the two passes, so their order matters at edges: up to 34 levels with
    Lanczos. By itself, Pillow may choose another order for a part than for the whole.
    """
    left, top, right, bottom = box
    if box == (0, 0, *image.size):
        return image.resize(size, resampling)
    reach = _REACH * max((bottom - top) / size[1], 1) + 1
    first, last = max(math.floor(top - reach), 0), min(math.ceil(bottom + reach), image.height)
    rows = image.crop((0, first, image.width, last))
    columns = rows.resize((size[0], rows.height), resampling, box=(left, 0, right, rows.height))
    return columns.resize(size, resampling, box=(0, top - first, size[0], bottom - first))


def _box(preprocessing: Preprocessing) -> tuple[int, int]:
    """Return the height and width that a picture is resized to, or that it must cover if its aspect ratio is kept."""
    resize, size = preprocessing.resize, preprocessing.size
    if not isinstance(resize, int):
        return resize
    height, width = (round(resize * side / min(size)) for side in size)
    return height, width


def resized_size(height: int, width: int, preprocessing: Preprocessing) -> tuple[int, int]:
    """Return the height and width of a resized picture: for a square crop those of torchvision's `Resize`."""
    rows, columns = _box(preprocessing)
    if not isinstance(preprocessing.resize, int):
        return rows, columns
    if width * rows <= height * columns:
        return int(columns * height / width), columns
    return rows, int(rows * width / height)


def _crop_axis(low: float, high: float, resized: int, crop: int) -> CropAxis:
    """Return the centre `crop` of an axis that maps ``low`` to ``high`` onto `resized` pixels."""
    if crop > resized:
        start = (crop - resized) // 2
        return CropAxis(start, start + resized, low, high)
    offset = round((resized - crop) / 2)  # halves to even, as torchvision
    scale = (high - low) / resized
    return CropAxis(0, crop, low + offset * scale, low + (offset + crop) * scale)
