"""Which files are images, what they may take, and metadata that says nothing about pixels."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import tracemalloc
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, features

from pipeline.errors import UnreadableImageError
from pipeline.images.decode import MEMORY_LIMIT, decode
from pipeline.images.formats import METADATA_LIMIT, has_image_header

GENERATOR = np.random.default_rng(3)
COLOURS = GENERATOR.integers(0, 256, (48, 64, 3), dtype=np.uint8)
SMOOTH = np.rint(np.mgrid[0:255:48j, 0:255:64j][[0, 1, 0]].transpose(1, 2, 0)).astype(np.uint8)
MIB = 1 << 20


def encode(pixels: np.ndarray, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


def icon(width: int, height: int, body: bytes) -> bytes:
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, width, height, 0, 0, 1, 32, len(body), 22) + body


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_header(width: int, height: int, depth: int, colour: int) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


# -- Formats -----------------------------------------------------------------------------------------------------------

CASES = {
    "jp2": (encode(COLOURS, "JPEG2000", irreversible=False), COLOURS, 0),
    "j2k": (encode(COLOURS, "JPEG2000", irreversible=False, no_jp2=True), COLOURS, 0),
    "pcx": (encode(COLOURS, "PCX"), COLOURS, 0),
    "dds": (encode(COLOURS, "DDS"), COLOURS, 0),
    "ico": (encode(COLOURS, "ICO", sizes=[(16, 12), (64, 48)]), COLOURS, 0),
    "ico of bitmaps": (encode(COLOURS, "ICO", sizes=[(64, 48)], bitmap_format="bmp"), COLOURS, 0),
    "apng": (encode(COLOURS, "PNG", save_all=True, append_images=[Image.new("RGB", (64, 48))]), COLOURS, 0),
    "mpo": (encode(SMOOTH, "MPO", save_all=True, append_images=[Image.new("RGB", (64, 48))], quality=95), SMOOTH, 8),
}
if features.check("avif"):
    CASES["avif"] = (encode(SMOOTH, "AVIF", quality=95), SMOOTH, 8)


@pytest.mark.parametrize("kind", CASES)
def test_each_format_is_known_by_its_first_bytes_and_read(kind: str) -> None:
    data, expected, tolerance = CASES[kind]
    assert has_image_header(io.BytesIO(data))
    assert np.abs(np.asarray(decode(data).image).astype(int) - expected).max() <= tolerance


@pytest.mark.parametrize("kind", CASES)
def test_damage_to_each_format_is_a_picture_or_a_reason(kind: str) -> None:
    data, generator = CASES[kind][0], np.random.default_rng(1)
    for _ in range(60):
        damaged = bytearray(data)
        for position in generator.integers(0, min(len(data), 400), 3):
            damaged[position] = generator.integers(0, 256)
        with suppress(UnreadableImageError):
            assert decode(bytes(damaged[: generator.integers(1, len(data) + 1)])).image.mode == "RGB"


def test_a_header_of_metadata_is_known_without_reading_all_of_it() -> None:
    data = encode(COLOURS, "PNG", icc_profile=b"\0" * 2_000_000)
    file = io.BytesIO(data)
    assert has_image_header(file)
    assert file.tell() < 100


# -- Metadata ----------------------------------------------------------------------------------------------------------


def described(method: str, *arguments: Any, **options: Any) -> bytes:
    info = PngImagePlugin.PngInfo()
    getattr(info, method)(*arguments, **options)
    return encode(COLOURS, "PNG", pnginfo=info)


@pytest.mark.parametrize(
    "data",
    [
        encode(COLOURS, "PNG", icc_profile=b"\0" * 2_000_000),
        described("add_text", "parameters", "x" * 3_000_000, zip=True),
        described("add_text", "parameters", "x" * 3_000_000),
        described("add_itxt", "XML:com.adobe.xmp", "y" * 2_000_000, zip=True),
        described("add_itxt", "XML:com.adobe.xmp", "y" * 2_000_000),
        described("add", b"tEXt", b"a\0" + b"z" * 2_000_000, after_idat=True),
        described("add", b"zTXt", b"a\0\0" + b"no deflate stream"),
    ],
    ids=["icc", "zTXt", "tEXt", "packed iTXt", "iTXt", "after the pixels", "damaged"],
)
def test_a_sound_png_is_read_whatever_its_metadata(data: bytes) -> None:
    np.testing.assert_array_equal(np.asarray(decode(data).image), COLOURS)


def test_many_texts_are_no_bomb() -> None:
    plain = encode(COLOURS, "PNG")
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(MIB - 100)))
    data = plain[:33] + 200 * text + plain[33:]
    tracemalloc.start()
    np.testing.assert_array_equal(np.asarray(decode(data).image), COLOURS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < len(data) + 8 * METADATA_LIMIT


def test_an_orientation_in_the_text_counts_beside_a_large_profile() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", '<rdf tiff:Orientation="3"/>')
    data = encode(COLOURS, "PNG", pnginfo=info, icc_profile=b"\0" * 2_000_000)
    np.testing.assert_array_equal(np.asarray(decode(data).image), COLOURS[::-1, ::-1])


# -- Memory ------------------------------------------------------------------------------------------------------------

PEAKS = """
import io, json, sys, zipfile
from pipeline.images.formats import needed_memory, reader_of
from pipeline.images.resize import prepare
from pipeline.spec import Preprocessing

rule = Preprocessing((32, 32), 32, "bilinear", (0.0,) * 3, (1.0,) * 3)

def status(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) << 10

found = {}
with zipfile.ZipFile(sys.argv[1]) as archive:
    for name in archive.namelist():
        data = archive.read(name)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # forget the highest peak so far
        before = status("VmRSS")
        reason = ""
        try:
            prepare(data, rule)
        except Exception as error:
            reason = str(error)
        peak = status("VmHWM") - before
        image = reader_of(data)(io.BytesIO(data))
        size = image.size
        image.draft(None, (64, 64))
        found[name] = peak, needed_memory(image, size), reason
print(json.dumps(found))
"""


@pytest.fixture
def peaks(tmp_path: Path) -> Any:
    """Decode files in a process of its own: peak memory in bytes, what was foretold, why a file was refused."""

    def measure(files: dict[str, bytes]) -> dict[str, tuple[int, int, str]]:
        with zipfile.ZipFile(tmp_path / "files.zip", "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        command = [sys.executable, "-c", PEAKS, str(tmp_path / "files.zip")]
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    return measure


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_no_image_takes_more_memory_than_its_header_tells(peaks: Any) -> None:
    side = 3000
    grey, colours = np.zeros((side, side), np.uint8), np.zeros((side, side, 3), np.uint8)
    files = {"first": encode(COLOURS, "PNG"), "bits": encode(grey.astype(bool), "PNG"), "grey": encode(grey, "PNG")}
    files |= {
        "palette": encode(grey, "GIF"),
        "wide": encode(grey.astype(np.uint16), "PNG"),
        "float": encode(grey.astype(np.float32), "TIFF", compression="tiff_deflate"),
        "alpha": encode(np.zeros((side, side, 4), np.uint8), "PNG"),
        "grey alpha": encode(np.zeros((side, side, 2), np.uint8), "PNG"),
        "turned": encode(grey, "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"),
        "strip": encode(colours, "TIFF", compression="tiff_lzw", strip_size=1 << 30),
        "progressive": encode(colours, "JPEG", progressive=True, subsampling=0),
        "webp": encode(colours, "WEBP", lossless=True, quality=0, method=0),
        "jp2": encode(colours, "JPEG2000"),
        "one row": encode(np.zeros((1, side * 999, 4), np.uint8), "PNG"),
        "one column": encode(np.zeros((side * 999, 1, 4), np.uint8), "PNG"),
    }
    if features.check("avif"):
        files["avif"] = encode(colours, "AVIF", speed=10)
    for name, (peak, needed, reason) in peaks(files).items():
        assert reason == "", name
        assert name == "first" or peak < needed + 64 * MIB, f"{name}: {peak / MIB:.0f} of {needed / MIB:.0f} MiB"


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_images_that_would_take_too_much_are_refused_before_they_take_it(peaks: Any) -> None:
    bombs = {
        f"{depth} bits, colour {colour}": png_header(13_000, 13_000, depth, colour)
        for depth, colour in [(1, 0), (8, 0), (8, 3), (16, 0), (8, 2), (16, 2), (8, 4), (16, 4), (8, 6), (16, 6)]
    }
    bombs["one row"] = png_header(169_000_000, 1, 16, 6)
    bombs["icon"] = icon(0, 0, png_header(13_000, 13_000, 16, 6))
    for name, (peak, needed, reason) in peaks({"first": encode(COLOURS, "PNG"), **bombs}).items():
        if name != "first":
            assert "MiB, more than 1024" in reason, name
            assert needed > MEMORY_LIMIT
            assert peak < 16 * MIB, f"{name}: {peak / MIB:.0f} MiB"


def test_a_bitmap_in_an_icon_is_not_larger_than_icons_are() -> None:
    bitmap = struct.pack("<IiiHHIIIIII", 40, 9_000, 9_000, 1, 32, 0, 0, 0, 0, 0, 0)
    with pytest.raises(UnreadableImageError, match="more than an icon has"):
        decode(icon(16, 16, bitmap))


def test_a_small_tiff_of_one_huge_tile_is_refused() -> None:
    tags = [(256, 32), (257, 32), (258, 8), (259, 5), (262, 1), (277, 1), (322, 1 << 16), (323, 1 << 16)]
    tags += [(324, 8), (325, 4)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    with pytest.raises(UnreadableImageError, match="MiB, more than"):
        decode(b"II*\0" + struct.pack("<I", 12) + bytes(4) + struct.pack("<H", len(tags)) + entries + bytes(4))


def test_the_file_counts_too() -> None:
    rows = (MEMORY_LIMIT // 8 - 1_000_000) // 10_000
    data = png_header(10_000, rows, 8, 2)
    with pytest.raises(UnreadableImageError, match="cannot be decoded"):  # it is cut short
        decode(data)
    with pytest.raises(UnreadableImageError, match="MiB, more than"):
        decode(data + bytes(9_000_000))
