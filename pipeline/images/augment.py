"""Augmented views: a random crop of a picture, mirrored, in other colours.

A view depends on its number and the image's bytes alone, so that it can be cached, and computed again anywhere.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from features_cache import nearest
from pipeline.errors import FitError
from pipeline.spec import NO_AUGMENT, View

AUGMENTS = ("crop", "flip", "colour")
AREA = (0.35, 1.0)
"""Smallest and largest share of the picture that a crop shows."""
ASPECT = (3 / 4, 4 / 3)
"""Smallest and largest width of a crop, relative to its height."""
STRENGTH = 0.3
"""Brightness, contrast and saturation are multiplied by 1 - STRENGTH to 1 + STRENGTH."""


def parse_augment(text: str) -> tuple[str, ...]:
    """Return the parts of an augmentation such as ``"crop+flip"``; empty for ``"none"``.

    Raises
    ------
    FitError
        If a part does not exist.
    """
    parts = () if text == NO_AUGMENT else tuple(text.split("+"))
    for part in parts:
        if part not in AUGMENTS:
            raise FitError(
                f"unknown augmentation '{part}'{nearest(part, AUGMENTS)}; expected {NO_AUGMENT}, or "
                f"{', '.join(AUGMENTS)} joined by +"
            )
    return parts


def view_generator(view: View, data: bytes) -> np.random.Generator:
    """Return the random generator for this view of the image file with these bytes."""
    digest = hashlib.blake2b(data, digest_size=16).digest()
    return np.random.default_rng([view.view, int.from_bytes(digest, "big")])


def random_box(
    box: tuple[float, float, float, float], generator: np.random.Generator
) -> tuple[float, float, float, float]:
    """Return a random part of `box`: left, top, right, bottom, all in pixels (Szegedy et al. 2015)."""
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    area = generator.uniform(*AREA) * width * height
    aspect = math.exp(generator.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
    part_width, part_height = min(math.sqrt(area * aspect), width), min(math.sqrt(area / aspect), height)
    x = left + generator.uniform(0, width - part_width)
    y = top + generator.uniform(0, height - part_height)
    return x, y, min(x + part_width, right), min(y + part_height, bottom)


def changed(image: Image.Image, parts: tuple[str, ...], generator: np.random.Generator) -> Image.Image:
    """Return `image`, mirrored half of the time and in other colours, as far as `parts` asks for it."""
    if "flip" in parts and generator.random() < 0.5:
        image = ImageOps.mirror(image)
    if "colour" in parts:
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = enhance(image).enhance(float(generator.uniform(1 - STRENGTH, 1 + STRENGTH)))
    return image
