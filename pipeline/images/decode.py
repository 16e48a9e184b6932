"""One set of rules for all image files: bytes become an upright RGB picture, or raise an error with a short reason.

The formats are those of `pipeline.images.formats`, recognised by their first bytes, whatever the file is called.

- EXIF orientation is applied; colour profiles are not.
- Grey, palette, CMYK, YCbCr and bilevel become RGB as Pillow converts them.
- Transparent pixels are blended with white.
- Only the first frame of an animation, or page of a stack, is read.
- 16 bits a channel are scaled to 8: 65,535 is white. The tags of grey TIFFs are followed: white may be zero, or 4,095
  (12 bits a sample). Wider integers, floats, and a white level that the caller states: see `_wide_to_rgb`.
- JPEGs may be decoded at 1/2, 1/4 or 1/8 (libjpeg's reduced DCT), but not below the `floor` that the caller sets.
- Images that have more than `PIXEL_LIMIT` pixels or take more than `MEMORY_LIMIT` are refused before they are decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from io import BytesIO
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT, TiffImageFile

from pipeline.errors import UnreadableImageError
from pipeline.images.formats import despite_warnings, needed_memory, reader_of

PIXEL_LIMIT = 178_956_970
"""Width times height above which an image is taken for a decompression bomb; Pillow has the same limit."""

MEMORY_LIMIT = 1 << 30
"""Most bytes that one image may take: its file, and what decoding it and making it RGB takes at most."""

REASON_LENGTH = 80

FEW_LEVELS = 1 << 14
"""If the white of 65,535 is assumed, images whose values are all below this keep fewer than 64 of 256 grey levels."""

_WHITE_IS_ZERO = 0
"""Value of a TIFF's tag PhotometricInterpretation."""

_BAND_PIXELS = 1 << 21
"""Pixels that are converted at once, as Pillow's and numpy's conversions take many times the memory of the result."""

_TURNS = {
    2: (Image.Transpose.FLIP_LEFT_RIGHT, False, True, False),
    3: (Image.Transpose.ROTATE_180, False, True, True),
    4: (Image.Transpose.FLIP_TOP_BOTTOM, False, False, True),
    5: (Image.Transpose.TRANSPOSE, True, False, False),
    6: (Image.Transpose.ROTATE_270, True, True, False),
    7: (Image.Transpose.TRANSVERSE, True, True, True),
    8: (Image.Transpose.ROTATE_90, True, False, True),
}
"""EXIF orientation: the transpose that undoes it, and whether that swaps the axes, then flips x, then flips y."""


class Picture(NamedTuple):
    """An upright RGB image, perhaps reduced, and which part of it shows the full image.

    Attributes
    ----------
    image : PIL.Image.Image
        Mode RGB.
    size : tuple of int
        Width and height of the full image, in its pixels.
    box : tuple of float
        Left, top, right and bottom of the part, in pixels of `image`. It is all of `image`, except after a reduced
        decode whose last pixels are only partly covered (4,001 pixels at 1/4 are 1,000.25).
    few_levels : bool
        Whether a grey image wider than 8 bits lost most levels, see `FEW_LEVELS`: its white may be below 65,535.
    """

    image: Image.Image
    size: tuple[int, int]
    box: tuple[float, float, float, float]
    few_levels: bool = False


@despite_warnings
def decode(data: bytes, floor: int | None = None, white: int | None = None) -> Picture:
    """Decode an image file's bytes.

    Parameters
    ----------
    data : bytes
        The whole file.
    floor : int, optional
        Least length of the shorter side, in pixels, after a reduced JPEG decode; by default nothing is reduced.
    white : int, optional
        The level that is white in grey images wider than 8 bits; by default as their tags and values say.

    Raises
    ------
    UnreadableImageError
        The bytes are empty, of no known format, truncated, damaged, of more than `PIXEL_LIMIT` pixels, or would take
        more than `MEMORY_LIMIT`.
    MemoryError
        There is not enough memory to decode them now.
    """
    if not data:
        raise UnreadableImageError("empty file")
    reader = reader_of(data)
    if reader is None:
        raise UnreadableImageError("not an image of a known format")
    try:
        image = reader(BytesIO(data))
        size = image.size
        if size[0] * size[1] > PIXEL_LIMIT:
            raise UnreadableImageError(f"{size[0]}x{size[1]} pixels, more than {PIXEL_LIMIT}")
        reduced = image.draft(None, (floor, floor)) if floor is not None else None
        needed = len(data) + needed_memory(image, size)
        if needed > MEMORY_LIMIT:
            raise UnreadableImageError(
                f"{size[0]}x{size[1]} pixels of {image.format} take {needed >> 20} MiB, more than {MEMORY_LIMIT >> 20}"
            )
        image.load()
        rgb, few_levels = _to_rgb(image, white)
        orientation = _orientation(image)
        del image  # frees its memory, unless it is RGB already
        covered = reduced[1][2:] if reduced is not None else size
        return _upright(rgb, orientation, size, covered, few_levels)
    except (UnreadableImageError, MemoryError, Warning):  # lack of memory is not the image's fault
        raise
    except Exception as error:  # damaged files make Pillow raise nearly anything
        raise UnreadableImageError(_reason(error)) from error


def _reason(error: Exception) -> str:
    """Return one short line: Pillow's message, or the type of an error that is not Pillow's own."""
    message = " ".join(str(error).split()) if isinstance(error, OSError | SyntaxError | ValueError) else ""
    return f"cannot be decoded: {message or type(error).__name__}"[:REASON_LENGTH]


@despite_warnings
def from_pillow(image: Image.Image) -> Picture:
    """Return a Pillow image of any mode as `decode` returns a file; `image` is not changed."""
    image.load()
    rgb, few_levels = _to_rgb(image, None)
    return _upright(rgb, _orientation(image), image.size, image.size, few_levels)


def _upright(
    rgb: Image.Image, orientation: int, size: tuple[int, int], covered: tuple[float, float], few_levels: bool
) -> Picture:
    """Turn `rgb`, given which pixels at its top left are `covered` by the full image of `size`."""
    turn = _TURNS.get(orientation)
    width, height = covered
    if turn is None:
        return Picture(rgb, size, (0.0, 0.0, width, height), few_levels)
    method, swap, flip_x, flip_y = turn
    rgb = rgb.transpose(method)
    if swap:
        size, width, height = (size[1], size[0]), height, width
    left = rgb.width - width if flip_x else 0.0
    top = rgb.height - height if flip_y else 0.0
    return Picture(rgb, size, (left, top, left + width, top + height), few_levels)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation; 1 (upright) if there is none or it is damaged: the pixels are sound all the same."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Warning:
        raise
    except Exception:
        return 1
    return orientation if isinstance(orientation, int) else 1


def as_array(rgb: Image.Image) -> np.ndarray:
    """Return the pixels of an RGB image, uint8 (h, w, 3), as a new array."""
    pixels = np.empty((rgb.height, rgb.width, 3), np.uint8)
    for top, band in _bands(rgb):
        pixels[top : top + band.height] = np.asarray(band)
    return pixels


def _bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Yield `image` in parts of all columns and some rows, each with the number of its first row."""
    rows = max(1, _BAND_PIXELS // max(1, image.width))
    if rows >= image.height:
        yield 0, image
        return
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _to_rgb(image: Image.Image, white: int | None) -> tuple[Image.Image, bool]:
    """Return `image` as RGB by the rules above, without turning it, and whether it lost most grey levels."""
    if image.mode.startswith(("I", "F")):
        return _wide_to_rgb(image, white)
    if not image.has_transparency_data:
        return (image if image.mode == "RGB" else image.convert("RGB")), False
    return _by_bands(image, _over_white), False


def _by_bands(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Return what `convert` makes of `image`, in RGB, a band at a time."""
    if image.width * image.height <= _BAND_PIXELS:
        return convert(image)
    rgb = Image.new("RGB", image.size)
    for top, band in _bands(image):
        rgb.paste(convert(band), (0, top))
    return rgb


def _over_white(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _wide_to_rgb(image: Image.Image, white: int | None) -> tuple[Image.Image, bool]:
    """Scale grey levels wider than 8 bits to 8 bits; see `_to_rgb`.

    Values above a `white` that the caller states are white, too. If it states none, white is 65,535 for integers from 0
    to 65,535 (4,095 in TIFFs of 12 bits a sample), and for non-negative floats the first of 1, 255 and 65,535 that none
    exceeds. In all other cases the least value becomes black and the greatest white; equal values become black.
    Non-finite floats count as 0.
    """
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    unsigned = bool(tags) and tags.get(SAMPLEFORMAT, (1,))[0] == 1

    def values_of(band: Image.Image) -> np.ndarray:
        values = np.asarray(band)
        if values.dtype.kind == "f":
            return np.nan_to_num(values.astype(np.float64), copy=False, nan=0.0, posinf=0.0, neginf=0.0)
        return values.view(np.uint32) if unsigned and values.dtype == np.int32 else values

    extremes = [(values.min(), values.max()) for values in (values_of(band) for _, band in _bands(image))]
    low, high = float(min(least for least, _ in extremes)), float(max(most for _, most in extremes))
    if white is not None:
        stated = [float(white)]
    elif image.mode == "F":
        stated = [level for level in (1.0, 255.0, 65_535.0) if low >= 0 and high <= level]
    else:
        level = 4_095.0 if unsigned and tags.get(BITSPERSAMPLE, (1,))[0] == 12 else 65_535.0
        stated = [level] if low >= 0 and high <= level else []
    black, span = (0.0, stated[0]) if stated else (low, high - low or 1.0)

    def convert(band: Image.Image) -> Image.Image:
        values = values_of(band)
        scaled = np.subtract(values, black, dtype=np.float64)  # changed in place: each copy would take as much again
        scaled /= span
        scaled *= 255
        grey = np.rint(np.clip(scaled, 0, 255, out=scaled), out=scaled).astype(np.uint8)
        if tags.get(PHOTOMETRIC_INTERPRETATION) == _WHITE_IS_ZERO:
            grey = 255 - grey
        if "transparency" in image.info:  # the one transparent level of a 16-bit PNG, which Pillow does not apply
            grey[values == image.info["transparency"]] = 255
        return Image.fromarray(grey).convert("RGB")

    return _by_bands(image, convert), white is None and span == 65_535.0 and 0 < high < FEW_LEVELS
