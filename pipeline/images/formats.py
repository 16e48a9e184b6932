"""The formats that are read: which Pillow class opens a file, told by its first bytes, and what decoding it will take.

`Image.open` is not used: it would warn about sizes that are allowed here, and try formats that are not.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Callable
from functools import wraps
from io import BytesIO
from threading import Lock
from typing import BinaryIO, ParamSpec, TypeVar

from PIL import Image
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.DdsImagePlugin import DdsImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.IcoImagePlugin import IcoFile
from PIL.ImageFile import ImageFile
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PcxImagePlugin import PcxImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE, ROWSPERSTRIP, TILELENGTH, TILEWIDTH, TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

METADATA_LIMIT = 1 << 20
"""Most bytes of text and colour profile that a PNG keeps, unpacked; more is left out before Pillow would refuse it."""

ICON_LIMIT = 256
"""Longest side of a picture in an icon, in pixels, unless the picture is a PNG."""

_STORED_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2}
"""Bytes of a pixel in Pillow's memory, where they are not 4."""

_DECODER_BYTES = {"zip": 4, "ppm": 8, "ppm_plain": 8, "dds_rgb": 8, "jpeg2k": 24, "WEBP": 16, "AVIF": 20}
"""Bytes of a pixel that Pillow's codecs (of a whole format, in capitals) take beside the image, where it is many."""

_METADATA = {b"tEXt", b"zTXt", b"iTXt", b"iCCP"}


P = ParamSpec("P")
R = TypeVar("R")
_quiet = Lock()


def despite_warnings(function: Callable[P, R]) -> Callable[P, R]:
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


def open_png(file: BinaryIO) -> PngImageFile:
    """Open a PNG, however much metadata it has."""
    return PngImageFile(BytesIO(_without_much_metadata(file.read())))


def _without_much_metadata(data: bytes) -> bytes:
    """Return a PNG without those chunks of text and colour profile that exceed `METADATA_LIMIT` together."""
    left, start, position, kept = METADATA_LIMIT, 0, 8, []
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        stop = position + 12 + length
        if kind in _METADATA:
            size = _unpacked_size(kind, data[position + 8 : stop - 4], left)
            if size <= left:
                left -= size
            else:
                kept.append(data[start:position])
                start = stop
        position = stop
    return b"".join([*kept, data[start:]]) if kept else data


def _unpacked_size(kind: bytes, body: bytes, limit: int) -> int:
    """Return how many bytes a chunk is unpacked; all above `limit` are told by a number above it."""
    rest = body.partition(b"\0")[2]  # after the keyword
    if kind == b"iTXt":
        packed = rest[2:].split(b"\0", 2)[-1] if rest[:1] == b"\1" else b""
    else:
        packed = b"" if kind == b"tEXt" else rest[1:]
    try:
        return len(body) + len(zlib.decompressobj().decompress(packed, limit + 1))
    except zlib.error:
        return len(body)


def open_icon(file: BinaryIO) -> Image.Image:
    """Open the largest picture of an icon."""
    icon = IcoFile(file)
    entry = icon.entry[0]
    file.seek(entry.offset)
    picture = BytesIO(file.read(entry.size))
    start = picture.read(12)
    if start.startswith(_PNG):
        picture.seek(0)
        return open_png(picture)
    width, height = struct.unpack("<4xii", start)  # the height counts a mask, too
    if abs(width) > ICON_LIMIT or abs(height) > 2 * ICON_LIMIT:
        raise ValueError(f"{width}x{height // 2} pixels, more than an icon has")
    return icon.frame(0)


Reader = Callable[[BinaryIO], Image.Image]
_PNG = b"\x89PNG\r\n\x1a\n"
_READERS: dict[bytes, Reader] = {
    b"\xff\xd8\xff": JpegImageFile,  # also the first picture of a multi-picture file
    _PNG: open_png,
    b"RIFF": WebPImageFile,
    b"II*\0": TiffImageFile,
    b"MM\0*": TiffImageFile,
    b"II+\0": TiffImageFile,
    b"MM\0+": TiffImageFile,
    b"GIF8": GifImageFile,
    b"BM": BmpImageFile,
    b"\0\0\0\x0cjP  \r\n\x87\n": Jpeg2KImageFile,
    b"\xff\x4f\xff\x51": Jpeg2KImageFile,  # without the boxes of a .jp2
    b"\0\0\1\0": open_icon,
    b"DDS ": DdsImageFile,
    **{b"\n%c" % version: PcxImageFile for version in (0, 2, 3, 5)},
    **{b"P%d" % kind: PpmImageFile for kind in range(1, 7)},
}
_AVIF_BRANDS = {b"ftypavif", b"ftypavis", b"ftypmif1", b"ftypmsf1"}
START_LENGTH = 16
"""Bytes that tell the format; a RIFF file names its kind in bytes 8 to 12."""


def reader_of(start: bytes) -> Reader | None:
    """Return what opens a file with these first bytes; None for an unknown format."""
    if start[4:12] in _AVIF_BRANDS:
        return AvifImageFile
    return next((reader for magic, reader in _READERS.items() if start.startswith(magic)), None)


def is_tiff(data: bytes) -> bool:
    """Tell whether a file is a TIFF by its first bytes."""
    return reader_of(data[:START_LENGTH]) is TiffImageFile


@despite_warnings
def has_image_header(file: BinaryIO) -> bool:
    """Tell whether the header of an open file is that of a known image; the pixels are not read."""
    try:
        file.seek(0)
        start = file.read(START_LENGTH)
        reader = reader_of(start)
        if reader is None or (start.startswith(b"RIFF") and start[8:12] != b"WEBP"):  # its reader would read all of it
            return False
        if reader is open_png:  # so would this
            return start[12:] == b"IHDR"
        file.seek(0)
        reader(file)
    except Warning:
        raise
    except Exception:  # damaged headers make Pillow raise nearly anything, and the file may be unreadable
        return False
    return True


def needed_memory(image: Image.Image, size: tuple[int, int]) -> int:
    """Return how many bytes it takes at most to decode an image and make it RGB, as its header tells.

    Parameters
    ----------
    image : PIL.Image.Image
        Opened, but not loaded; a reduced decode is set.
    size : tuple of int
        Width and height before a reduction.
    """
    (width, height), stored = image.size, _STORED_BYTES.get(image.mode, 4)
    tiles = image.tile if isinstance(image, ImageFile) else []
    codec = str(tiles[0][0]) if tiles else ""
    decoder = max(_DECODER_BYTES.get(name, 0) for name in (codec, image.format or ""))
    needed = width * (height * max(8, stored + 4, stored + decoder) + 16) + 40 * height
    if isinstance(image, JpegImageFile):  # a file of several scans: all coefficients, of 2 bytes
        across, down = (max(layer[axis] for layer in image.layer) for axis in (1, 2))
        needed += 2 * size[0] * size[1] * sum(layer[1] * layer[2] for layer in image.layer) // (across * down)
    if isinstance(image, TiffImageFile) and codec == "libtiff":  # a whole strip or tile
        tags = image.tag_v2
        rows = min(tags.get(ROWSPERSTRIP, height), height)
        tile = tags[TILEWIDTH] * tags[TILELENGTH] if TILEWIDTH in tags else width * rows
        needed += tile * max(sum(tags.get(BITSPERSAMPLE, (1,))), 32) // 8
    return needed
