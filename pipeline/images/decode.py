"""One set of rules for all image files: bytes become an upright RGB picture, or raise an error with a short reason.

Formats: JPEG, PNG, WebP, TIFF, GIF, BMP and PNM, recognised by their first bytes, whatever the file is called.

- EXIF orientation is applied; colour profiles are not.
- Grey, palette, CMYK, YCbCr and bilevel become RGB as Pillow converts them.
- Transparent pixels are blended with white.
- Only the first frame of an animation, or page of a stack, is read.
- 16 bits a channel are scaled to 8: 65,535 is white. Wider integers outside that range, and floats, see `_to_8_bit`.
- JPEGs may be decoded at 1/2, 1/4 or 1/8 (libjpeg's reduced DCT), but not below the `floor` that the caller sets.
- Images of more than `PIXEL_LIMIT` pixels are refused before they are decoded.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from io import BytesIO
from threading import Lock
from typing import BinaryIO, NamedTuple, ParamSpec, TypeVar

import numpy as np
from PIL import ExifTags, Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from pipeline.errors import UnreadableImageError

PIXEL_LIMIT = 178_956_970
"""Width times height above which an image is taken for a decompression bomb; Pillow has the same limit."""

REASON_LENGTH = 80

_READERS: dict[bytes, Callable[[BinaryIO], ImageFile]] = {
    b"\xff\xd8\xff": JpegImageFile,  # also the first picture of a multi-picture file
    b"\x89PNG\r\n\x1a\n": PngImageFile,
    b"RIFF": WebPImageFile,
    b"II*\0": TiffImageFile,
    b"MM\0*": TiffImageFile,
    b"II+\0": TiffImageFile,
    b"MM\0+": TiffImageFile,
    b"GIF8": GifImageFile,
    b"BM": BmpImageFile,
    **{b"P%d" % kind: PpmImageFile for kind in range(1, 7)},
}
_MAGIC_LENGTH = 12
"""Bytes that tell the format; a RIFF file names its kind in the last four."""

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
    """

    image: Image.Image
    size: tuple[int, int]
    box: tuple[float, float, float, float]


P = ParamSpec("P")
R = TypeVar("R")
_quiet = Lock()


def _despite_warnings(function: Callable[P, R]) -> Callable[P, R]:
    """Let `function` have no warnings where it failed by one, as with ``python -W error``: none may refuse an image."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except Warning:
            with _quiet, warnings.catch_warnings():  # whose filters are those of all threads
                warnings.simplefilter("ignore")
                return function(*args, **kwargs)

    return call


@_despite_warnings
def decode(data: bytes, floor: int | None = None) -> Picture:
    """Decode an image file's bytes.

    Parameters
    ----------
    data : bytes
        The whole file.
    floor : int, optional
        Least length of the shorter side, in pixels, after a reduced JPEG decode; by default nothing is reduced.

    Raises
    ------
    UnreadableImageError
        The bytes are empty, of no known format, truncated, damaged, or of more than `PIXEL_LIMIT` pixels.
    MemoryError
        There is not enough memory to decode them now.
    """
    if not data:
        raise UnreadableImageError("empty file")
    reader = _reader_of(data)
    if reader is None:
        raise UnreadableImageError("not an image of a known format")
    try:
        # `Image.open` would warn about sizes that are allowed here; the format's own class does not.
        image = reader(BytesIO(data))
        size = image.size
        if size[0] * size[1] > PIXEL_LIMIT:
            raise UnreadableImageError(f"{size[0]}x{size[1]} pixels, more than {PIXEL_LIMIT}")
        reduced = image.draft(None, (floor, floor)) if floor is not None else None
        return _upright(image, size, reduced[1][2:] if reduced is not None else size)
    except (UnreadableImageError, MemoryError, Warning):  # lack of memory is not the image's fault
        raise
    except Exception as error:  # damaged files make Pillow raise nearly anything
        raise UnreadableImageError(_reason(error)) from error


@_despite_warnings
def has_image_header(file: BinaryIO) -> bool:
    """Tell whether the header of an open file is that of an image which `decode` knows; the pixels are not read."""
    try:
        file.seek(0)
        start = file.read(_MAGIC_LENGTH)
        reader = _reader_of(start)
        if reader is None or (start.startswith(b"RIFF") and start[8:] != b"WEBP"):  # the reader would read all of it
            return False
        file.seek(0)
        reader(file)
    except Warning:
        raise
    except Exception:  # damaged headers make Pillow raise nearly anything, and the file may be unreadable
        return False
    return True


def _reader_of(data: bytes) -> Callable[[BinaryIO], ImageFile] | None:
    return next((reader for magic, reader in _READERS.items() if data.startswith(magic)), None)


def _reason(error: Exception) -> str:
    """Return one short line: Pillow's message, or the type of an error that is not Pillow's own."""
    message = " ".join(str(error).split()) if isinstance(error, OSError | SyntaxError | ValueError) else ""
    return f"cannot be decoded: {message or type(error).__name__}"[:REASON_LENGTH]


@_despite_warnings
def from_pillow(image: Image.Image) -> Picture:
    """Return a Pillow image of any mode as `decode` returns a file; `image` is not changed."""
    return _upright(image, image.size, image.size)


def _upright(image: Image.Image, size: tuple[int, int], covered: tuple[float, float]) -> Picture:
    """Return upright RGB, given which pixels at the top left of `image` are `covered` by the full image of `size`."""
    image.load()
    rgb = to_rgb(image)
    turn = _TURNS.get(_orientation(image))
    width, height = covered
    if turn is None:
        return Picture(rgb, size, (0.0, 0.0, width, height))
    method, swap, flip_x, flip_y = turn
    rgb = rgb.transpose(method)
    if swap:
        size, width, height = (size[1], size[0]), height, width
    left = rgb.width - width if flip_x else 0.0
    top = rgb.height - height if flip_y else 0.0
    return Picture(rgb, size, (left, top, left + width, top + height))


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation; 1 (upright) if there is none or it is damaged: the pixels are sound all the same."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Warning:
        raise
    except Exception:
        return 1
    return orientation if isinstance(orientation, int) else 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Return `image` as RGB by the rules above, without turning it."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith(("I", "F")):
        grey = _to_8_bit(np.asarray(image))
        if "transparency" in image.info:  # the one transparent level of a 16-bit PNG, which Pillow does not apply
            grey[np.asarray(image) == image.info["transparency"]] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _to_8_bit(values: np.ndarray) -> np.ndarray:
    """Scale grey levels wider than 8 bits to uint8, of the same shape.

    White is 65,535 for integers from 0 to 65,535, and for non-negative floats the first of 1, 255 and 65,535 that none
    exceeds. In all other cases the least value becomes black and the greatest white; equal values become black.
    Non-finite floats count as 0.
    """
    values_are_integers = np.issubdtype(values.dtype, np.integer)
    values = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    whites = (65_535.0,) if values_are_integers else (1.0, 255.0, 65_535.0)
    low, high = float(values.min()), float(values.max())
    white = next((white for white in whites if low >= 0 and high <= white), None)
    if white is None:
        values, white = values - low, high - low or 1.0
    return np.rint(values / white * 255).astype(np.uint8)
