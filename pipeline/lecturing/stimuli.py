"""Made images for one level of the hierarchy each: gratings, textures, and parts of figures."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np

from pipeline.arrays import Float64Array
from pipeline.images.sources.items import ImageSource, Item, build_source

SIDE = 64
_AXIS = np.linspace(-1, 1, SIDE)
_Y, _X = np.meshgrid(_AXIS, _AXIS, indexing="ij")
Draw = Callable[[int, np.random.Generator], Float64Array]
"""Draws an image (64, 64), about 0 to 1, of a class."""


def _waves(angle: float, cycles: float, phase: float) -> Float64Array:
    return np.asarray(np.sin(np.pi * cycles * (_X * np.cos(angle) + _Y * np.sin(angle)) + phase))


def grating(kind: int, rng: np.random.Generator) -> Float64Array:
    """Draw a grating whose class is its orientation, in steps of 22.5 degrees."""
    contrast = rng.uniform(0.1, 0.4)
    return 0.5 + contrast * _waves(kind * np.pi / 8, rng.uniform(2, 9), rng.uniform(0, 2 * np.pi))


def texture(kind: int, rng: np.random.Generator) -> Float64Array:
    """Draw a texture in any orientation: the class is how waves, or random spots, are combined."""
    angle, cycles, phase = rng.uniform(0, np.pi), rng.uniform(4, 9), rng.uniform(0, 2 * np.pi, 4)
    one, other = _waves(angle, cycles, phase[0]), _waves(angle + np.pi / 2, cycles, phase[1])
    oblique = _waves(angle + np.pi / 3, cycles, phase[2])
    mixed = (
        lambda: one,
        lambda: (one + other) / 2,
        lambda: one * other,
        lambda: (one + oblique) / 2,
        lambda: np.sign(one),
        lambda: np.maximum(one, other),
        lambda: np.sin(3 * _waves(angle, 2, phase[3]) + np.pi * cycles * (_X * np.sin(angle) - _Y * np.cos(angle))),
        lambda: rng.normal(size=(SIDE, SIDE)),
    )[kind]()
    return 0.5 + rng.uniform(0.1, 0.4) * mixed


_ARMS = ((0,), (0, 90), (0, 180), (0, 90, 180), (0, 90, 180, 270), (0, 45), (0, 120, 240), (0, 135))
"""Directions of the strokes that meet in a part, in degrees: an end, an L, a bar, a T, a cross, and others."""


def part(kind: int, rng: np.random.Generator) -> Float64Array:
    """Draw strokes that meet somewhere, in any orientation; the class is the angles between them."""
    x, y = rng.uniform(-0.4, 0.4, 2)
    turn, length, width = rng.uniform(0, 2 * np.pi), rng.uniform(0.3, 0.6), rng.uniform(0.03, 0.08)
    nearest = np.full((SIDE, SIDE), np.inf)
    for degrees in _ARMS[kind]:
        angle = turn + np.deg2rad(degrees)
        along = np.clip((_X - x) * np.cos(angle) + (_Y - y) * np.sin(angle), 0, length)
        away = np.hypot(_X - x - along * np.cos(angle), _Y - y - along * np.sin(angle))
        nearest = np.minimum(nearest, away)
    return np.asarray(0.2 + rng.uniform(0.3, 0.7) / (1 + np.exp((nearest - width) / 0.01)))


STIMULI: dict[str, Draw] = {"edges": grating, "textures": texture, "parts": part}
_CLASSES = 8
_NOISE = 0.15


def stimulus_source(name: str, each: int) -> ImageSource:
    """Return a source of so many images of each of eight classes, with noise, drawn by seed 0."""
    rng = np.random.default_rng(0)
    images: dict[str, bytes] = {}
    labelled = []
    for number in range(each * _CLASSES):
        kind, uri = number % _CLASSES, f"{name}/{number:04d}"
        image = STIMULI[name](kind, rng) + rng.normal(0, _NOISE, (SIDE, SIDE))
        images[uri] = f"P5\n{SIDE} {SIDE}\n255\n".encode() + (255 * image.clip(0, 1)).astype(np.uint8).tobytes()
        version = zlib.crc32(images[uri])  # stands for the time, or a cache would not notice other drawings
        labelled.append((Item(uri, size=len(images[uri]), mtime_ns=version), str(kind)))
    return build_source(name, name, labelled, lambda item: images[item.uri])
