"""One resize against torchvision's two steps, over sizes, aspect ratios, filters and reduced JPEG decodes."""

from __future__ import annotations

import math
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from pipeline.images import resize as transform
from pipeline.images.decode import from_pillow
from pipeline.images.resize import jpeg_floor, prepare, prepare_all, resize_and_crop, resized_size
from pipeline.spec import Preprocessing

HALF = (0.5, 0.5, 0.5)
SIDES = st.integers(1, 400) | st.integers(1, 8)


def preprocessing(
    resize: int | tuple[int, int], crop: tuple[int, int], interpolation: str = "bilinear"
) -> Preprocessing:
    return Preprocessing(size=crop, resize=resize, interpolation=interpolation, mean=HALF, std=HALF)


def photo(width: int, height: int, seed: int = 0, low: int = 0, high: int = 256) -> Image.Image:
    """Make something like a photo: light and dark over wide areas, edges, and a little noise."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(low, high, (5, 7, 3), dtype=np.uint8)).resize((width, height), 3)
    pixels = np.asarray(coarse).astype(int) + generator.integers(-9, 10, (height, width, 3))
    pixels[height // 3 : height // 2, width // 4 : width // 2] += (high - low) // 3
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def two_steps(image: Image.Image, wanted: Preprocessing) -> np.ndarray:
    sides = wanted.resize
    if isinstance(sides, int) and wanted.size[0] != wanted.size[1]:  # torchvision would set the shorter side
        sides = resized_size(image.height, image.width, wanted)
    resize = Resize(sides, InterpolationMode(wanted.interpolation), antialias=True)
    return np.asarray(Compose([resize, CenterCrop(wanted.size)])(image)).astype(int)


def one_step(image: Image.Image, wanted: Preprocessing) -> np.ndarray:
    pixels = resize_and_crop(from_pillow(image), wanted)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (*wanted.size, 3)
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable
    return pixels.astype(int)


@given(
    width=SIDES,
    height=SIDES,
    resize=st.integers(4, 70) | st.tuples(st.integers(4, 70), st.integers(4, 70)),
    crop=st.tuples(st.integers(1, 80), st.integers(1, 80)),
    interpolation=st.sampled_from(["bilinear", "bicubic", "lanczos"]),
)
@example(width=375, height=250, resize=36, crop=(32, 32), interpolation="bicubic")
@example(width=250, height=375, resize=35, crop=(32, 32), interpolation="bilinear")
@example(width=250, height=251, resize=33, crop=(40, 41), interpolation="bilinear")
@example(width=1, height=400, resize=64, crop=(32, 32), interpolation="bicubic")
@example(width=64, height=64, resize=64, crop=(31, 30), interpolation="bicubic")
@settings(max_examples=150, deadline=None)
def test_within_two_grey_levels_of_two_steps(
    width: int, height: int, resize: int | tuple[int, int], crop: tuple[int, int], interpolation: str
) -> None:
    """Where overshoot leaves the scale, Pillow clips it between its two passes, whose order it chooses by the crop."""
    wanted = preprocessing(resize, crop, interpolation)
    image = photo(width, height) if interpolation == "bilinear" else photo(width, height, low=80, high=150)
    assert np.abs(one_step(image, wanted) - two_steps(image, wanted)).max() <= 2


@pytest.mark.parametrize(
    ("resize", "crop", "interpolation"),
    [
        (256, 224, "bilinear"),
        (232, 224, "bilinear"),
        (342, 299, "bilinear"),
        (235, 224, "bicubic"),
        ((224, 224), 224, "bicubic"),
    ],
)
@pytest.mark.parametrize("size", [(500, 375), (333, 500), (640, 427), (200, 150)], ids=str)
def test_the_sizes_networks_use(resize: int, crop: int, interpolation: str, size: tuple[int, int]) -> None:
    wanted = preprocessing(resize, (crop, crop), interpolation)
    image = photo(*size, seed=3)
    difference = np.abs(one_step(image, wanted) - two_steps(image, wanted))
    assert difference.max() <= 2
    assert difference.mean() < 0.3  # a box that is off by a fraction of a pixel costs several times that


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize(("size", "resize", "crop"), [((333, 500), 342, 299), ((458, 800), 256, 224)], ids=str)
def test_the_width_is_resized_before_the_height(
    size: tuple[int, int], resize: int, crop: int, interpolation: str
) -> None:
    """On hard black and white edges the passes overshoot and are clipped, so that the other order shows."""
    width, height = size
    squares = np.random.default_rng(2).integers(0, 2, (height // 9 + 1, width // 9 + 1), dtype=np.uint8) * 255
    image = Image.fromarray(np.kron(squares, np.ones((9, 9), np.uint8))[:height, :width]).convert("RGB")
    wanted = preprocessing(resize, (crop, crop), interpolation)
    assert np.abs(one_step(image, wanted) - two_steps(image, wanted)).max() <= 2


@pytest.mark.parametrize("size", [(2, 3000), (3000, 2)], ids=str)
def test_of_a_long_thin_picture_only_what_the_crop_keeps_is_resized(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole of 2 x 65,000 pixels would take gigabytes."""
    wanted, image = preprocessing(64, (56, 56), "bicubic"), photo(*size, low=80, high=150)
    expected = two_steps(image, wanted)
    monkeypatch.setattr(transform, "_resize_whole", None)
    assert np.abs(one_step(image, wanted) - expected).max() <= 2


def test_nearest_takes_pixels_as_they_are() -> None:
    wanted = preprocessing(40, (32, 36), "nearest")
    image = photo(131, 97)
    same = (one_step(image, wanted) == two_steps(image, wanted)).all(axis=2)
    assert same.mean() > 0.9  # the others are halves, rounded to the other neighbour
    assert {tuple(pixel) for pixel in one_step(image, wanted).reshape(-1, 3)} <= {
        tuple(pixel) for pixel in np.asarray(image).astype(int).reshape(-1, 3)
    }


def test_without_resizing_the_crop_is_exact() -> None:
    image = photo(90, 61)
    wanted = preprocessing(61, (33, 44), "bicubic")
    top, left = round((61 - 33) / 2), round((90 - 44) / 2)
    np.testing.assert_array_equal(one_step(image, wanted), np.asarray(image)[top : top + 33, left : left + 44])


def test_a_crop_larger_than_the_picture_stands_on_black() -> None:
    pixels = one_step(Image.new("RGB", (30, 20), "white"), preprocessing(20, (40, 41)))
    expected = np.zeros((40, 41), int)
    expected[10:30, 5:35] = 255
    np.testing.assert_array_equal(pixels, np.repeat(expected[..., None], 3, 2))


@given(width=st.integers(1, 5000), height=st.integers(1, 5000), resize=st.integers(1, 600))
def test_resized_size_is_torchvisions(width: int, height: int, resize: int) -> None:
    from torchvision.transforms.functional import _compute_resized_output_size

    found = resized_size(height, width, preprocessing(resize, (resize, resize)))
    assert list(found) == _compute_resized_output_size((height, width), [resize])


@given(
    width=st.integers(1, 5000), height=st.integers(1, 5000), share=st.floats(0.5, 1),
    size=st.tuples(st.integers(32, 600), st.integers(32, 600)),
)  # fmt: skip
def test_a_picture_covers_a_box_of_the_proportions_of_the_crop(
    width: int, height: int, share: float, size: tuple[int, int]
) -> None:
    edge = math.floor(min(size) / share)
    rows, columns = (edge * side / min(size) for side in size)
    found = resized_size(height, width, preprocessing(edge, size))
    factor = max(rows / height, columns / width)  # of timm's ResizeKeepRatio
    np.testing.assert_allclose(found, (height * factor, width * factor), rtol=0.02 + 1 / min(size), atol=1)
    assert found[0] >= size[0]
    assert found[1] >= size[1]


def test_the_jpeg_floor_is_twice_the_resize_size() -> None:
    assert jpeg_floor(preprocessing(256, (224, 224))) == 512
    assert jpeg_floor(preprocessing((100, 300), (100, 300))) == 600


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(1001, 777), (517, 517), (1537, 1025)], ids=str)
@pytest.mark.parametrize("resize", [48, (48, 48)], ids=str)
def test_reduced_jpegs_keep_the_geometry(
    size: tuple[int, int], orientation: int, resize: int | tuple[int, int]
) -> None:
    """On slopes of grey a shift shows as a difference; the last reduced pixel, cut short, would make it over 1."""
    width, height = size
    x, y = np.arange(width) / width + np.zeros((height, 1)), np.arange(height)[:, None] / height + np.zeros(width)
    slopes = np.stack([20 + 215 * x, 20 + 215 * y, 235 - 215 * x], axis=2).round().astype(np.uint8)
    tags = Image.Exif()
    tags[274] = orientation
    file = BytesIO()
    Image.fromarray(slopes).save(file, "JPEG", quality=97, subsampling=0, exif=tags)
    wanted = preprocessing(resize, (48, 48))
    reduced = prepare(file.getvalue(), wanted).astype(int)
    full = two_steps(ImageOps.exif_transpose(Image.open(file)), wanted)
    assert not np.array_equal(reduced, full)  # so it was reduced
    difference = reduced - full
    assert np.abs(difference).max() <= 2
    edges = [difference[:3], difference[-3:], difference[:, :3], difference[:, -3:]]
    assert max(np.abs(edge.mean(axis=(0, 1))).max() for edge in edges) < 0.75


@pytest.mark.parametrize("orientation", [1, 6, 7])
def test_reduced_photos_stay_close(orientation: int) -> None:
    tags = Image.Exif()
    tags[274] = orientation
    file = BytesIO()
    photo(803, 601).save(file, "JPEG", quality=92, exif=tags)
    wanted = preprocessing(64, (56, 56), "bicubic")
    full = two_steps(ImageOps.exif_transpose(Image.open(file)), wanted)
    difference = np.abs(prepare(file.getvalue(), wanted).astype(int) - full)
    assert difference.mean() < 1
    assert difference.max() < 12


def test_networks_of_equal_geometry_share_one_decode_and_one_resize(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = BytesIO()
    photo(300, 200).save(buffer, "JPEG")
    wanted = [preprocessing(64, (56, 56)), preprocessing(96, (80, 80)), preprocessing(64, (56, 56))]
    wanted[2] = replace(wanted[2], mean=(0.1, 0.2, 0.3))
    expected = [prepare(buffer.getvalue(), one) for one in wanted]
    calls = []
    for name in ("decode", "resize_and_crop"):
        plain = getattr(transform, name)
        monkeypatch.setattr(transform, name, lambda *args, name=name, plain=plain: calls.append(name) or plain(*args))
    found = prepare_all(buffer.getvalue(), wanted)
    assert sorted(calls) == ["decode", "decode", "resize_and_crop", "resize_and_crop"]
    for pixels, one in zip(found.pixels, expected, strict=True):
        np.testing.assert_array_equal(pixels, one)
