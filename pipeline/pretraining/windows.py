"""Square windows that move over a picture: what a camera sees before and after it moves a little.

A window shows 1 / `CANVAS` of the picture's shorter side, so that no corner of it leaves the picture: a black corner
would tell how far the window is turned.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipeline.spec import Preprocessing

CANVAS = 1.75
"""Side of the part of the picture over which windows move, in sides of a window."""
OFFSET = 0.0625
"""Farthest that the first window lies from the middle of the canvas along each axis, in sides of a window."""
TURNED = 7.5
"""Most degrees by which the first window is turned."""
SHIFTS = (-0.125, -0.0625, 0.0, 0.0625, 0.125)
"""How far the second window lies from the first along each axis, in sides of a window: the classes of ego-motion."""
TURNS = (-15.0, -7.5, 0.0, 7.5, 15.0)
"""By how many degrees the second window is turned against the first: the classes of ego-motion."""
PAN, PAN_TURN = 0.1, 5.0
"""Farthest that a window moves from one frame of a synthetic pan to the next, and most degrees by which it turns."""


class Pose(NamedTuple):
    """Where a window lies: its middle, from that of the canvas in sides of a window, and how far it is turned."""

    x: float
    y: float
    degrees: float

    def moved(self, x: float, y: float, degrees: float) -> Pose:
        """Return the pose after a motion that is given in the directions of this window."""
        cos, sin = _turn(self.degrees)
        return Pose(self.x + cos * x - sin * y, self.y + sin * x + cos * y, self.degrees + degrees)


def canvas_of(preprocessing: Preprocessing) -> Preprocessing:
    """Return the preprocessing that gives the canvas of a network whose inputs are windows."""
    height, width = (round(CANVAS * side) for side in preprocessing.size)
    resize = height if isinstance(preprocessing.resize, int) else (height, width)
    return replace(preprocessing, size=(height, width), resize=resize)


def window(canvas: np.ndarray, pose: Pose, size: tuple[int, int]) -> np.ndarray:
    """Return what the window at `pose` shows of a canvas (h, w, 3): pixels of `size` (height, width), bilinear."""
    height, width = size
    cos, sin = _turn(pose.degrees)
    middle_x, middle_y = canvas.shape[1] / 2 + pose.x * width, canvas.shape[0] / 2 + pose.y * height
    across = (cos, -sin, middle_x - cos * width / 2 + sin * height / 2)
    down = (sin, cos, middle_y - sin * width / 2 - cos * height / 2)
    moved = Image.fromarray(canvas).transform(
        (width, height), Image.Transform.AFFINE, (*across, *down), Image.Resampling.BILINEAR
    )
    return np.asarray(moved)


def first_pose(generator: np.random.Generator) -> Pose:
    """Draw where the first window of a pair lies."""
    x, y = generator.uniform(-OFFSET, OFFSET, 2)
    return Pose(float(x), float(y), float(generator.uniform(-TURNED, TURNED)))


def _turn(degrees: float) -> tuple[float, float]:
    return math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
